-- What may a person ask of a store? The views that every other query reads.
-- in: the KIND_files views of schema.sql, each replaced by the store's files of that kind where it has any
-- out: samples, shards, partials, histograms, activations, moments, overlap, concept_overlap, salience, ranges
-- Columns pass through untouched, so that a filter on hook_point, layer and neuron reaches the row groups' statistics.

create or replace view samples as
select sample, shard, batch, concept, "row", n_tokens, truncated, text, token_ids from samples_files;

-- Every planned shard, and what its receipt says once it is committed.
create or replace view shards as
with receipt as (
    select regexp_extract(shard::varchar, '\d+')::integer as shard, attempt, n_truncated, n_nonfinite, seconds.total as seconds,
        try_cast(finished_at as timestamp) as finished_at
    from commits_files
)
select p.shard, p.concept, p.n_samples, p.n_tokens, p.n_batches, p.samples_file, p.row_group,
    r.shard is not null as committed, r.attempt, r.n_truncated, r.n_nonfinite, r.seconds, r.finished_at
from plan_files p left join receipt r using (shard);

create or replace view partials as
select layer, hook_point, neuron, concept, n, n_nonfinite, mean, m2, m3, m4, min, max, mean_abs from partials_files;

create or replace view histograms as
select layer, hook_point, neuron, concept, bin, n from histograms_files;

create or replace view activations as
select layer, hook_point, neuron, sample, position, concept, value from raw_files;

create or replace view moments as
select layer, hook_point, neuron, concept, n, n_nonfinite, mean, std, skewness, kurtosis, min, max, mean_abs from moments_files;

create or replace view overlap as
select layer, hook_point, neuron, concept_a, concept_b, tau, ovl, ovl_gaussian, bhattacharyya, range_jaccard, b_in_a, a_in_b
from overlap_files;

-- How far a neuron's values under one concept are shared with the other concepts, of those pairs that were kept.
create or replace view concept_overlap as
select layer, hook_point, neuron, concept, count(*) as n_pairs, avg(shared) as mean_ovl
from (
    select layer, hook_point, neuron, concept_a as concept, coalesce(ovl, ovl_gaussian)::double as shared from overlap
    union all
    select layer, hook_point, neuron, concept_b, coalesce(ovl, ovl_gaussian)::double from overlap
)
group by layer, hook_point, neuron, concept;

create or replace view salience as
select layer, hook_point, neuron, concept, method, score, rank from salience_files;

create or replace view ranges as
select regexp_extract(filename, 'tbl_\w+') as table_id,
    hook_point, layer, neuron, concept, n, mean, std, mean_abs, salience, rank, lower, upper
from ranges_files;
