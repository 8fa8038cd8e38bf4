"""All, and only, the package code that imports Ray."""
