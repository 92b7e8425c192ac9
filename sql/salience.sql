-- Which neurons matter most to a concept? Three answers, in long form.
-- in: moments, concept_overlap (may be empty: then there is no `selectivity`), $hook_point, $layer
-- out: layer, hook_point, neuron, concept, method, score, rank (1 = most salient within method and concept; ties by neuron)
-- mean_abs     mean |x| over the concept's samples (Haider et al. 2026).
-- cohens_d     |mean - mean of the rest| / pooled std, the rest being all other concepts together (Cohen 1988). Where nothing
--              varies it is 0 for equal values and infinity for different ones.
-- selectivity  1 - the mean overlap with the other concepts: histogram overlap, Gaussian where there is no histogram. It takes
--              all pairs: the statistics stage works it out before it drops any; where some are missing, it is NULL.
-- A score that cannot be computed (a concept without values, no other concept) is NULL and ranks last.
with moment as (
    -- A centre near all concepts, so that the squares below do not lose their digits to a large common mean.
    select neuron, concept, n, mean, std, mean_abs, min, max, sum(n * mean) over here / sum(n) over here as centre
    from moments
    where hook_point = $hook_point and layer = $layer
    window here as (partition by neuron)
),
rest as (
    select neuron, concept, n, mean, std, centre,
        sum(n) over others as n_rest,
        sum(n * (mean - centre)) over others / n_rest as shift,  -- mean of the rest, from the centre
        sum(n * (std * std + (mean - centre) * (mean - centre))) over others as s2,
        min(min) over others as min_rest, max(max) over others as max_rest
    from moment
    window others as (
        partition by neuron rows between unbounded preceding and unbounded following exclude current row
    )
),
deviation as (
    select neuron, concept, abs(mean - centre - shift) as distance,
        -- Equal values have no spread, exactly; the difference of sums would leave a rounding error in its place.
        if(min_rest = max_rest, 0, greatest(0, s2 - n_rest * shift * shift)) as m2_rest,
        sqrt((n * std * std + m2_rest) / nullif(n + n_rest - 2, 0)) as pooled_std
    from rest
    where n_rest > 0 and n > 0
),
score as (
    select neuron, concept, 'mean_abs' as method, mean_abs as score from moment
    union all
    select neuron, concept, 'cohens_d', if(d.distance = 0, 0, d.distance / d.pooled_std)
    from moment m left join deviation d using (neuron, concept)
    union all
    select neuron, concept, 'selectivity', if(n_pairs = n_concepts - 1, 1 - mean_ovl, null)
    from (
        select neuron, concept, count(*) over (partition by neuron) as n_concepts from moment
    )
    join concept_overlap o using (neuron, concept)
    where o.hook_point = $hook_point and o.layer = $layer
)
select $layer::smallint as layer, $hook_point::varchar as hook_point, neuron, concept, method, score,
    row_number() over (partition by method, concept order by score desc nulls last, neuron)::integer as rank
from score
order by method, concept, rank;
