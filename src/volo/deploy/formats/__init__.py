"""Writers of formats, one a module: `write(program, path, names, description, **how)` leaves the file at `path`, with
`description` inside, and returns what the report is to say of it."""
