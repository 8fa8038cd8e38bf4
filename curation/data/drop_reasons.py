"""What can be wrong with a sample or a shard: every reason for a drop, and all that is counted without one."""

from __future__ import annotations

from curation.data.captions import LEFT_OUT, TOO_MANY

DROP_REASONS: dict[str, str] = {
    # Raised by the readers of tars and parquet files, the first that applies.
    "tar:not_a_tar": "the shard holds no valid tar header: a web page, a compressed file",
    "tar:truncated": "the shard ends inside the sample",
    "tar:corrupt_header": "a tar header of the sample is damaged",
    "tar:sparse": "a member of the sample is stored as a sparse file, which no tool of this ecosystem writes",
    "parquet:unreadable": "the shard is no parquet file, or its footer is damaged",
    "parquet:damaged": "the row's part of the parquet file is damaged",
    "image:not_downloaded": "a URL without image bytes: a metadata list, to be downloaded with img2dataset first",
    "image:missing": "no member has one of the recipe's image extensions; no such column, or null",
    "image:not_bytes": "the image column holds no bytes",
    "image:empty": "the image member has no bytes",
    "image:too_large": "the image member is above max_image_bytes",
    "caption:missing": "no caption member or column, or the json has no such field, or null",
    "caption:unreadable": "the json that should hold the caption is broken or above its limits",
    "caption:not_text": "the json's caption field, or the caption column, is no string",
    "caption:not_utf8": "the caption member is not UTF-8",
    "caption:too_large": "the caption is above max_caption_bytes",
    "caption:empty": "the caption is blank",
    # Raised by open_shard.py.
    "sample:excluded": "a list that is applied at read names the sample; nothing of it but uid, key and place is kept",
    # Raised by attempts.py.
    "sample:crashes_worker": "three workers died while they decoded it; as a shard's one row: in it, at no sample",
    # Raised by images.py.
    "image:unrecognized": "no allowed decoder recognises the bytes",
    "image:bad_header": "a decoder recognises the bytes, but not their header",
    "image:too_many_pixels": "the header, or that of an image inside the image, declares more than max_pixels",
    "image:extreme_aspect": "one side is more than 200 times the other",
    "image:decode_failed": "the header is fine, the pixels are not",
    "image:resize_failed": "the decoded image cannot be brought to the model's size",
    # Raised by embedding.
    "embedding:not_finite": "the sample's embedding has a NaN or an infinity, or is zero",
    # Raised by reading cached embeddings.
    "embedding:missing": "no file of embeddings lies beside the shard",
    "embedding:unreadable": "the file of embeddings is damaged, or holds other arrays than its layout says",
    "embedding:not_aligned": "the file of embeddings has another number of rows than the shard",
}
"""Every reason for which a sample is dropped, and what it means. A reason that is not in this list is a defect."""

WARNINGS: dict[str, str] = {
    "tar:no_end_marker": "the two zero blocks at the end are missing, nothing else is",
    "tar:lone_zero_block": "a single zero block between members",
    "tar:data_after_end": "more than zeros behind the end marker; members there were read",
    "json:invalid": "a json is not valid UTF-8 JSON; the sample has no fields",
    "json:too_deep": "a json is nested too deeply to parse; the sample has no fields",
    "json:too_large": "a json is above max_json_bytes; the sample has no fields",
    "json:not_an_object": "a json is a list or a value; the sample has no fields",
    "json:too_many_fields": "a json has more than max_json_fields fields; the first ones are kept",
    "json:too_many_columns": "a json has fields beyond the 4,096 names that a shard's table has columns for",
    "parquet:column_left_out": "a column of bytes, tensors or an unknown type is not carried over",
    "parquet:value_left_out": "a value that no json can hold, or that is above max_json_bytes, became null",
    LEFT_OUT: "with best_caption_of: a text that cannot be a caption; the sample has others, or is dropped",
    TOO_MANY: "with best_caption_of: more than max_captions captions; the first ones are kept",
    "uid:malformed": "a uid is not 32 hex digits; the sample has the uid of its content",
    "image:not_plain_jpeg": "no plain JPEG: with resize fast, it was decoded and resized the exact way",
    "gpu:batch_halved": "the GPU ran out of memory; batches are smaller by this factor",
    "metadata:no_row": "the pool's metadata have no row with the sample's uid; it lacks their numbers",
    "shard:set_aside": "three workers died in the shard and at none of its samples: nothing of it was embedded",
    "shard:absent": "a shard is named by the pattern, but is not there",
    "guards:no_value": "a row lacks the url or sha256 by which a list or an evaluation set finds it, and was let pass",
    "selection:no_vector": "a row that reached a step that compares rows lacks the column: the step left it out",
    "audit:lift": "a group of samples is kept much more, or much less, often than others: see selection/audit.parquet",
}
"""Everything that is counted without dropping a sample."""
