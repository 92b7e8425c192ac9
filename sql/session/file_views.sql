-- Which files stand behind the views?
-- in: nothing      out: sql, the statement that makes each KIND_files view of this session
select 'create or replace view ' || substr(sql, length('create view ') + 1) as sql
from duckdb_views()
where not internal and suffix(view_name, '_files')
order by view_oid;
