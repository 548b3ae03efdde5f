"""``ddpm-fast bench``: what is measured, how, and how it is shown.

`measure` takes times, `Case`s say what is done, each of `ops`, `steps`, `sampling`, `waterfall`, `growth` and
`training` makes cases and tables of them, `suite` runs groups of tables. ``pytest benchmarks`` times the same
cases one by one.
"""
