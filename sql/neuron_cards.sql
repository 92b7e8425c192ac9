-- What does each neuron of a block do under each concept? The macro neuron_card for all of them at once, but for the range.
-- in: moments, distributions, overlap, salience, $hook_point, $layer, $first_neuron, $last_neuron
-- out: one row per neuron and concept, in that order; the range is mean -+ tau * std
-- Of two concepts that share equally much, the first by name is the nearest one.
with other as (
    select neuron, concept_a as concept, concept_b as other, coalesce(ovl, ovl_gaussian) as shared
    from overlap
    where hook_point = $hook_point and layer = $layer and neuron between $first_neuron and $last_neuron
    union all
    select neuron, concept_b, concept_a, coalesce(ovl, ovl_gaussian)
    from overlap
    where hook_point = $hook_point and layer = $layer and neuron between $first_neuron and $last_neuron
),
confused as (
    select neuron, concept, avg(shared) as mean_ovl, max(shared) as nearest_ovl,
        arg_min(other, {less: -shared, name: other}) filter (shared is not null) as nearest
    from other
    group by neuron, concept
),
shape as (
    select neuron, concept, ks, p05, p50, p95
    from distributions
    where hook_point = $hook_point and layer = $layer and neuron between $first_neuron and $last_neuron
),
ranked as (
    select neuron, concept, rank
    from salience
    where method = 'mean_abs' and hook_point = $hook_point and layer = $layer and neuron between $first_neuron and $last_neuron
)
select neuron, concept, n, mean, std, min, p05, p50, p95, max, mean_abs, skewness, kurtosis, ks, rank, mean_ovl, nearest, nearest_ovl
from moments
left join shape using (neuron, concept)
left join confused using (neuron, concept)
left join ranked using (neuron, concept)
where hook_point = $hook_point and layer = $layer and neuron between $first_neuron and $last_neuron
order by neuron, concept;
