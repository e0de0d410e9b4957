"""How rows are read: a module for each kind of file. The table is `pipeline.input.read.FORMATS`."""
