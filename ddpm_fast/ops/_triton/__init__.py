"""The ops in Triton, one file each; `ops._dispatch` imports them where Triton runs."""
