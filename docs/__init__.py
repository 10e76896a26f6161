"""What the site is built from: `pages/` is written by hand, these modules make the rest from cards and docstrings."""
