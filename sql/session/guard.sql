-- How does a session see a store's files and nothing else? Run once, after the views were made.
-- in: $paths, the files      out: nothing. DuckDB could still write over these files: neuronlens.lens refuses what would.
set allowed_paths = $paths;
set enable_external_access = false;
set python_enable_replacements = false;  -- a name that is no table must not find a variable of the program around it
set lock_configuration = true;
