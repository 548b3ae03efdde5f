"""The APIs of other libraries, kept: one folder each, and the only place where such a library is imported."""
