-- Which views, table macros and keywords may a query hold, and what is each of them?
-- in: nothing      out: kind (view, macro or keyword), name, comment, in the order in which they were made
select kind, name, comment
from (
    select 'view' as kind, view_name as name, comment, view_oid as made from duckdb_views() where not internal
    union all
    select 'macro', function_name, comment, function_oid
    from duckdb_functions()
    where not internal and function_type = 'table_macro'
    union all
    select 'keyword', keyword_name, '', 0 from duckdb_keywords() where keyword_category = 'reserved'
)
where comment is not null
order by kind, made, name;
