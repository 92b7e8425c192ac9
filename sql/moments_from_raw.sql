-- What are the moments of every neuron under every concept, computed from the values themselves?
-- in: activations(layer, hook_point, neuron, concept, value), $hook_point, $layer; the macros of macros.sql
-- out: one row per neuron and concept, as table `moments` of docs/store-format.md; it must agree with merge.sql
-- Two passes: the mean, then sums of powers of the distance from it. Power sums around zero would lose everything at a mean
-- of 10,000 std. NaN and infinite values are counted in n_nonfinite and are in nothing else (DuckDB's own skewness() fails on
-- one).
-- The second pass groups by one integer, not by (neuron, concept): a quarter faster.
with value as not materialized (
    select neuron, concept, if(isfinite(value), value, null) as x
    from activations
    where hook_point = $hook_point and layer = $layer
),
centre as (
    -- `having` always holds: it tells the planner that this side is the small one, to build the join's hash table on.
    select row_number() over () as id, * from (
        select neuron, concept, count(x) as n, count(*) - count(x) as n_nonfinite, avg(x) as centre
        from value
        group by neuron, concept
        having count(*) > 0
    )
),
distance as (
    select id, x, x - centre as d from value join centre using (neuron, concept)
),
total as (
    select id, min(x) as min, max(x) as max, sum(abs(x)) as sum_abs,
        sum(d) as s1, sum(d * d) as s2, sum(d * d * d) as s3, sum((d * d) * (d * d)) as s4
    from distance
    group by id
),
centred as (
    select neuron, concept, n, n_nonfinite, min, max, sum_abs / n as mean_abs, s1 / n as drift, centre,
        central_2(n, s1, s2) as c2, central_3(n, s1, s2, s3) as c3, central_4(n, s1, s2, s3, s4) as c4
    from centre join total using (id)
)
select $layer::smallint as layer, $hook_point::varchar as hook_point, neuron, concept, n, n_nonfinite,
    centre + drift as mean,
    if(n > 0, sqrt(greatest(c2, 0)), null) as std,
    skewness_of(c3, std) as skewness, kurtosis_of(c4, std) as kurtosis,
    min, max, mean_abs
from centred
order by neuron, concept;
