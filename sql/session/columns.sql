-- What does each column of a view mean?
-- in: $view      out: one row per column, in its order
select column_name, data_type as column_type, comment
from duckdb_columns()
where table_name = $view and not internal
order by column_index;
