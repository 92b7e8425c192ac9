-- Which neurons serve the most concepts, and how well do their values keep those concepts apart?
-- in: moments, salience, overlap (may be empty), $salience (a method of salience.sql), $top_fraction
-- out: the 50 neurons that are salient for the most concepts; among equals, the one whose concepts overlap least comes first
-- mean_ovl is over the pairs of concepts for which the neuron is salient (histogram overlap, Gaussian where there is none):
-- near 0 the concepts lie in separate ranges, near 1 the neuron takes the same values for all of them. It is NULL where some of
-- those pairs were not kept (recipe: overlap.keep), since what is left would not stand for them; n_pairs says how many were.
with width as (
    select hook_point, layer, count(distinct neuron) as width from moments group by all
),
salient as (
    select hook_point, layer, neuron, concept
    from salience s join width w using (hook_point, layer)
    where s.method = $salience and s.score is not null and s.rank <= greatest(1, floor($top_fraction::double * w.width))
),
neuron_concepts as (
    select hook_point, layer, neuron, count(*) as n_concepts, list(concept order by concept) as concepts
    from salient
    group by all
),
neuron_overlap as (
    select o.hook_point, o.layer, o.neuron, count(*) as n_pairs, avg(coalesce(o.ovl, o.ovl_gaussian)) as mean_known
    from overlap o
    join salient a on (a.hook_point, a.layer, a.neuron, a.concept) = (o.hook_point, o.layer, o.neuron, o.concept_a)
    join salient b on (b.hook_point, b.layer, b.neuron, b.concept) = (o.hook_point, o.layer, o.neuron, o.concept_b)
    group by all
)
select hook_point, layer, neuron, n_concepts, coalesce(n_pairs, 0) as n_pairs,
    if(n_pairs = n_concepts * (n_concepts - 1) / 2, mean_known, null) as mean_ovl, concepts
from neuron_concepts left join neuron_overlap using (hook_point, layer, neuron)
order by n_concepts desc, mean_ovl nulls last, hook_point, layer, neuron
limit 50;
