-- What follows from a store's rows alone? Views over the views: shapes, overlap of concepts, salient sets.
-- in: the views of views.sql, the macros of macros.sql
-- out: quantiles, gaussianity, concept_overlap, concept_information, overlap_by_layer, salient (macro), salient_overlap,
--     polysemantic

create or replace view quantiles as
select layer, hook_point, neuron, concept, n, min, p01, p05, p25, p50, p75, p95, p99, max
from moments join distributions using (layer, hook_point, neuron, concept);

-- Jarque-Bera is n/6 (skewness^2 + excess^2 / 4), chi-squared with 2 degrees of freedom for many Gaussian values (Jarque and Bera
-- 1987): it grows with n, so that of many values nothing is Gaussian; the distances ks and ks_bound do not.
create or replace view gaussianity as
select layer, hook_point, neuron, concept, n, skewness, kurtosis - 3 as excess_kurtosis,
    n / 6 * (skewness * skewness + (kurtosis - 3) * (kurtosis - 3) / 4) as jarque_bera,
    ks, ks_bound, near_gaussian(skewness, kurtosis) as near_gaussian
from moments left join distributions using (layer, hook_point, neuron, concept);

-- How far a neuron's values under one concept are shared with the other concepts, of those pairs that were kept.
create or replace view concept_overlap as
select layer, hook_point, neuron, concept, count(*) as n_pairs, avg(shared) as mean_ovl
from (
    select layer, hook_point, neuron, concept_a as concept, coalesce(ovl, ovl_gaussian)::double as shared from overlap
    union all
    select layer, hook_point, neuron, concept_b, coalesce(ovl, ovl_gaussian)::double from overlap
)
group by layer, hook_point, neuron, concept;

-- I(bin; concept or not): over the bins that the concept reaches, n_cb log2(n_cb N / (n_b n_c)) and the same for the others' values
-- there; the bins that it does not reach, where all are the others', give their share times log2(N / n_others).
create or replace view concept_information as
with counts as (
    select layer, hook_point, neuron, concept, bin, sum(n)::double as n
    from histograms
    group by layer, hook_point, neuron, concept, bin
),
share as (
    select layer, hook_point, neuron, concept, n,
        sum(n) over (partition by layer, hook_point, neuron, bin) as n_bin,
        sum(n) over (partition by layer, hook_point, neuron, concept) as n_own,
        sum(n) over (partition by layer, hook_point, neuron) as n_all
    from counts
)
select layer, hook_point, neuron, concept,
    if(n_own < n_all, greatest(0, (
        sum(n * log2(n * n_all / (n_bin * n_own))
            + if(n_bin > n, (n_bin - n) * log2((n_bin - n) * n_all / (n_bin * (n_all - n_own))), 0))
        + (n_all - sum(n_bin)) * log2(n_all / (n_all - n_own))
    ) / n_all), null) as bits
from share
group by layer, hook_point, neuron, concept, n_own, n_all;

-- The rows that overlap least are dropped first (recipe: overlap.keep): with any dropped, only mean and median of the others are
-- known, and the smallest is not in the store.
create or replace view overlap_by_layer as
with width as (
    select hook_point, layer, max(neuron) + 1 as width from moments group by hook_point, layer
),
summary as (
    select hook_point, layer, concept_a, concept_b, count(*) as n_neurons, avg(coalesce(ovl, ovl_gaussian)) as mean_ovl,
        median(coalesce(ovl, ovl_gaussian)) as median_ovl, min(coalesce(ovl, ovl_gaussian)) as min_ovl,
        avg((coalesce(ovl, ovl_gaussian) < 0.5)::integer) as share_below_half
    from overlap
    group by hook_point, layer, concept_a, concept_b
)
select hook_point, layer, concept_a, concept_b, n_neurons, width - n_neurons as n_dropped, mean_ovl, median_ovl,
    if(n_dropped = 0, min_ovl, null) as min_ovl, if(n_dropped = 0, share_below_half, null) as share_below_half
from summary join width using (hook_point, layer);

-- The salient set of a concept in a layer: its first max(1, floor(top_fraction * width)) neurons.
create or replace macro salient(method := 'mean_abs', top_fraction := 0.3) as table
with width as (
    select m.hook_point, m.layer, max(m.neuron) + 1 as width from moments m group by m.hook_point, m.layer
)
select s.hook_point, s.layer, s.neuron, s.concept, s.rank, s.score
from salience s join width w on s.hook_point = w.hook_point and s.layer = w.layer
where s.method = method and s.score is not null and s.rank <= greatest(1, floor(top_fraction::double * w.width));

create or replace macro salient_jaccard(method := 'mean_abs', top_fraction := 0.3) as table
with chosen as materialized (
    from salient(method := method, top_fraction := top_fraction)
),
size as (
    select hook_point, layer, concept, count(*) as n from chosen group by hook_point, layer, concept
),
pair as (
    select a.hook_point, a.layer, a.concept as concept_a, b.concept as concept_b, a.n as n_a, b.n as n_b
    from size a join size b on a.hook_point = b.hook_point and a.layer = b.layer and a.concept < b.concept
),
shared as (
    select a.hook_point, a.layer, a.concept as concept_a, b.concept as concept_b, count(*) as n_both
    from chosen a join chosen b
        on a.hook_point = b.hook_point and a.layer = b.layer and a.neuron = b.neuron and a.concept < b.concept
    group by all
)
select p.hook_point, p.layer, p.concept_a, p.concept_b, p.n_a, p.n_b, coalesce(s.n_both, 0) as n_both,
    coalesce(s.n_both, 0) / (p.n_a + p.n_b - coalesce(s.n_both, 0)) as jaccard
from pair p left join shared s using (hook_point, layer, concept_a, concept_b);

create or replace macro polysemantic_at(method := 'mean_abs', top_fraction := 0.3) as table
select hook_point, layer, neuron, count(*) as n_concepts, list(concept order by concept) as concepts
from salient(method := method, top_fraction := top_fraction)
group by hook_point, layer, neuron;

create or replace view salient_overlap as
select hook_point, layer, concept_a, concept_b, n_a, n_b, n_both, jaccard from salient_jaccard();

create or replace view polysemantic as
select hook_point, layer, neuron, n_concepts, concepts from polysemantic_at();
