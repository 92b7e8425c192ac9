-- What are the moments of every neuron under every concept, over all shards?
-- in: partials(layer, hook_point, neuron, concept, n, n_nonfinite, mean, m2, m3, m4, min, max, mean_abs), $hook_point, $layer
-- out: one row per neuron and concept, as table `moments` of docs/store-format.md. Needs the macros of macros.sql.
-- K-way merge of centred sums (Pebay 2008): with d = mean_i - centre, M2 = sum(m2 + n d^2), M3 = sum(m3 + 3 d m2 + n d^3),
-- M4 = sum(m4 + 4 d m3 + 6 d^2 m2 + n d^4). The centre is the merged mean, up to its own rounding; `drift`, what remains of
-- sum(n d) / n, takes that rounding out again, which matters where the mean is thousands of times the std.
-- Measured on 3.2 M rows: joining the centre back 6 M rows/s, a window 4 M, lists of structs 1.3 M. The files are read twice,
-- so that memory holds one row per neuron and concept however many shards there are.
with centre as (
    -- `having` always holds: it tells the planner that this side is the small one, to build the join's hash table on.
    select row_number() over () as id, * from (
        select neuron, concept, sum(n)::bigint as n, sum(n_nonfinite)::bigint as n_nonfinite,
            sum(n * mean) / nullif(sum(n), 0) as centre
        from partials
        where hook_point = $hook_point and layer = $layer
        group by neuron, concept
        having count(*) > 0
    )
),
part as (
    select id, p.n::double as n, p.mean - c.centre as d, p.m2, p.m3, p.m4, p.min, p.max, p.mean_abs
    from partials p join centre c using (neuron, concept)
    where p.hook_point = $hook_point and p.layer = $layer
),
total as (
    select id, min(min) as min, max(max) as max, sum(n * mean_abs) as sum_abs,
        sum(n * d) as s1,
        sum(m2 + n * d * d) as s2,
        sum(m3 + d * (3 * m2 + n * d * d)) as s3,
        sum(m4 + d * (4 * m3 + d * (6 * m2 + n * d * d))) as s4
    from part
    group by id
),
centred as (
    select neuron, concept, n, n_nonfinite, min, max, sum_abs / n as mean_abs, s1 / n as drift, centre,
        central_2(n, s1, s2) as c2, central_3(n, s1, s2, s3) as c3, central_4(n, s1, s2, s3, s4) as c4,
        min = max as is_constant  -- a partial's mean and m2 carry rounding errors that would pass for a spread
    from centre join total using (id)
)
select $layer::smallint as layer, $hook_point::varchar as hook_point, neuron, concept, n, n_nonfinite,
    if(is_constant, min::double, centre + drift) as mean,
    case when is_constant then 0 when n > 0 then sqrt(greatest(c2, 0)) end as std,
    skewness_of(c3, std) as skewness, kurtosis_of(c4, std) as kurtosis,
    min, max, mean_abs
from centred
order by neuron, concept;
