-- How many of their salient neurons do two concepts have in common, layer by layer?
-- in: salient (mean_abs, the top 0.3), $concepts (a list)      out: one row per hook point, layer and pair of those concepts
-- The same numbers as in the view salient_overlap, without working out the other concepts' pairs.
with chosen as materialized (
    from salient() where list_contains($concepts::varchar[], concept)
),
size as (
    select hook_point, layer, concept, count(*) as n from chosen group by hook_point, layer, concept
),
shared as (
    select a.hook_point, a.layer, a.concept as concept_a, b.concept as concept_b, count(*) as n_both
    from chosen a join chosen b
        on a.hook_point = b.hook_point and a.layer = b.layer and a.neuron = b.neuron and a.concept < b.concept
    group by all
)
select a.hook_point, a.layer, a.concept as concept_a, b.concept as concept_b, coalesce(s.n_both, 0) as n_both,
    coalesce(s.n_both, 0) / (a.n + b.n - coalesce(s.n_both, 0)) as jaccard
from size a
join size b on a.hook_point = b.hook_point and a.layer = b.layer and a.concept < b.concept
left join shared s
    on s.hook_point = a.hook_point and s.layer = a.layer and s.concept_a = a.concept and s.concept_b = b.concept
order by a.hook_point, a.layer, concept_a, concept_b;
