-- Which range of values does each salient neuron give to each concept?
-- in: moments, salience, $tau, $top_fraction, $salience (a method of salience.sql)
-- out: one row per concept and salient neuron, as table `ranges` of docs/store-format.md: [mean - tau * std, mean + tau * std]
-- Salient are the first max(1, floor(top_fraction * width)) neurons of a concept in a layer, width being the layer's neurons.
-- No row comes of a concept with fewer than 2 values (one value has no spread, so no range) or of a salience without a score.
-- An infinite score stands as the largest double, since a table holds finite numbers only.
-- A neuron that always takes the same value under a concept keeps its row: its range is that one value.
with width as (
    select hook_point, layer, count(distinct neuron) as width from moments group by all
)
select m.hook_point, m.layer, m.neuron, m.concept, m.n, m.mean, m.std, m.mean_abs, least(s.score, 1.7976931348623157e308) as salience, s.rank,
    if(isinf($tau::double), '-infinity'::double, m.mean - $tau::double * m.std) as lower,
    if(isinf($tau::double), 'infinity'::double, m.mean + $tau::double * m.std) as upper
from salience s
join moments m using (hook_point, layer, neuron, concept)
join width w using (hook_point, layer)
where s.method = $salience and s.rank <= greatest(1, floor($top_fraction::double * w.width))
    and s.score is not null and m.n >= 2 and m.std is not null
order by m.hook_point, m.layer, m.concept, s.rank;
