-- Which neurons, salient in one of two stores, changed their rank most?
-- in: salience (store A), salience_b (store B), $method, $top_fraction, $top, how many
-- out: one row per hook point, layer, concept and neuron, the largest change first
-- Neurons that are salient in neither are left out: in the middle of a layer a rank changes by hundreds with the last digit of a
-- score. change is rank_b - rank_a: above 0, the neuron matters less in B.
with pair as (
    select hook_point, layer, concept, method, neuron, a.score as score_a, b.score as score_b, a.rank as rank_a, b.rank as rank_b,
        greatest(1, floor($top_fraction * count(*) over (partition by hook_point, layer, concept))) as n_salient
    from salience a join salience_b b using (hook_point, layer, concept, method, neuron)
    where method = $method
)
select hook_point, layer, concept, method, neuron, score_a, score_b, rank_a, rank_b, rank_b - rank_a as change,
    rank_a <= n_salient as salient_a, rank_b <= n_salient as salient_b
from pair
where least(rank_a, rank_b) <= n_salient and rank_a <> rank_b and score_a is not null and score_b is not null
order by abs(change) desc, least(rank_a, rank_b), hook_point, layer, concept, neuron
limit $top;
