-- Which neurons matter most to a concept? Seven answers, in long form.
-- in: moments, concept_overlap and concept_information (either may be empty), $hook_point, $layer
-- out: layer, hook_point, neuron, concept, method, score, rank (1 = most salient within method and concept; ties by neuron)
-- mean_abs            mean |x| over the concept's samples (Haider et al. 2026).
-- mean                mean x: neurons that the concept drives up.
-- probeless           mean distance of the concept's mean from the means of the other concepts (Antverg and Belinkov 2022, who
--                     sum it over all pairs; here one concept's pairs).
-- cohens_d            effect size: |mean - mean of the rest| / pooled std, the rest being all other concepts together (Cohen 1988).
--                     Where nothing varies it is 0 for equal values and infinity for different ones.
-- selectivity         1 - the mean overlap with the other concepts: histogram overlap, Gaussian where there is no histogram. It
--                     takes all pairs: the statistics stage works it out before it drops any; where some are missing, it is NULL.
-- f_ratio             variance between the concepts over variance within them (Fisher's F, one-way): one number a neuron, the same
--                     for all its concepts. Infinity where only the concepts differ, 0 where nothing does.
-- mutual_information  of a value's histogram bin and whether its text has the concept, in bits; no rows without histograms.
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
-- Distances to all other means from one sorted pass: those below are mean - other, those above other - mean.
sorted as (
    select neuron, concept, mean - centre as d, row_number() over upwards as place, count(*) over (partition by neuron) as k,
        sum(mean - centre) over upwards as up_to, sum(mean - centre) over (partition by neuron) as total
    from moment
    where n > 0
    window upwards as (partition by neuron order by mean, concept rows between unbounded preceding and current row)
),
probeless as (
    select neuron, concept, (place * d - up_to + (total - up_to) - (k - place) * d) / (k - 1) as score
    from sorted
    where k > 1
),
variance as (
    select neuron, count(*) as k, sum(n) as n, sum(n * (mean - centre) * (mean - centre)) as between_concepts,
        sum(n * std * std) as within_concepts, min(min) as min, max(max) as max
    from moment
    where n > 0
    group by neuron
),
f_ratio as (
    select neuron,
        case
            when min = max then 0
            when within_concepts = 0 then 'infinity'::double
            else between_concepts / (k - 1) / (within_concepts / (n - k))
        end as score
    from variance
    where k > 1 and n > k
),
information as (
    select neuron, concept, bits from concept_information where hook_point = $hook_point and layer = $layer
),
score as (
    select neuron, concept, 'mean_abs' as method, mean_abs as score from moment
    union all
    select neuron, concept, 'mean', mean from moment
    union all
    select neuron, concept, 'probeless', p.score from moment left join probeless p using (neuron, concept)
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
    union all
    select neuron, concept, 'f_ratio', if(n > 0, f.score, null) from moment left join f_ratio f using (neuron)
    union all
    select neuron, concept, 'mutual_information', i.bits
    from moment left join information i using (neuron, concept)
    where exists (from information)
)
select $layer::smallint as layer, $hook_point::varchar as hook_point, neuron, concept, method, score,
    row_number() over (partition by method, concept order by score desc nulls last, neuron)::integer as rank
from score
order by method, concept, rank;
