"""The pairwise study: which of two images is better, asked of people on a web page.

`study` is what is shown, `schedule` which pair is next, `store` the votes on disk, `render` an image as it is served,
`server` and `static/` the pages, `results_page` what came of it.
"""
