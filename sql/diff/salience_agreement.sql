-- Do two stores order the neurons of a concept alike, and do they call the same ones salient?
-- in: salience (store A), salience_b (store B), $top_fraction
-- out: one row per hook point, layer, concept and method that both hold, those that agree least first
-- spearman  correlation of the neurons' ranks, of those with a score in both stores; equal scores share their mean rank (Spearman
--           1904). NULL where all scores of a store are equal.
-- jaccard   of the salient sets, rank <= max(1, floor(top_fraction * width)) as in a range table: shared neurons over all in either.
with pair as (
    select hook_point, layer, concept, method, neuron, a.score as score_a, b.score as score_b, a.rank as rank_a, b.rank as rank_b
    from salience a join salience_b b using (hook_point, layer, concept, method, neuron)
),
scored as (
    select *, row_number() over (layer_a) as place_a, row_number() over (layer_b) as place_b
    from pair
    where score_a is not null and score_b is not null
    window layer_a as (partition by hook_point, layer, concept, method order by score_a),
        layer_b as (partition by hook_point, layer, concept, method order by score_b)
),
ranked as (
    select hook_point, layer, concept, method,
        avg(place_a) over (partition by hook_point, layer, concept, method, score_a) as place_a,
        avg(place_b) over (partition by hook_point, layer, concept, method, score_b) as place_b
    from scored
),
agreement as (
    select hook_point, layer, concept, method, count(*) as n_neurons, corr(place_a, place_b) as spearman
    from ranked
    group by all
),
width as (
    select hook_point, layer, concept, method, greatest(1, floor($top_fraction * count(*))) as n_salient from pair group by all
),
salient as (
    select hook_point, layer, concept, method, any_value(n_salient)::integer as n_salient,
        count(*) filter (rank_a <= n_salient and score_a is not null) as n_a,
        count(*) filter (rank_b <= n_salient and score_b is not null) as n_b,
        count(*) filter (rank_a <= n_salient and rank_b <= n_salient and score_a is not null and score_b is not null) as n_both
    from pair join width using (hook_point, layer, concept, method)
    group by all
)
select hook_point, layer, concept, method, coalesce(n_neurons, 0) as n_neurons,
    if(isnan(spearman), null, spearman) as spearman, n_salient, n_both, n_both / nullif(n_a + n_b - n_both, 0) as jaccard
from salient left join agreement using (hook_point, layer, concept, method)
order by spearman nulls last, hook_point, layer, concept, method;
