-- What may a person ask of a store? The views that every other query reads.
-- in: the KIND_files views of schema.sql, each replaced by the store's files of that kind where it has any
-- out: samples, shards, partials, shard_histograms, histograms, activations, moments, distributions, overlap, salience, ranges,
--     evaluations
-- Columns pass through untouched, so that a filter on hook_point, layer and neuron reaches the row groups' statistics. They are
-- named with their table, since a bare `layer` could also be the argument of a macro that reads the view.

-- What the model answered stands beside a text where the collectors recorded it.
create or replace view samples as
select sample, shard, batch, concept, "row", n_tokens, truncated, text, token_ids, predicted, correct, confidence
from samples_files left join predictions_files using (sample);

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
select try_cast(regexp_extract(filename, 'shard-(\d+)', 1) as integer) as shard,
    layer, hook_point, neuron, concept, n, n_nonfinite, mean, m2, m3, m4, min, max, mean_abs
from partials_files;

create or replace view shard_histograms as
select try_cast(regexp_extract(filename, 'shard-(\d+)', 1) as integer) as shard, layer, hook_point, neuron, concept, bin, n
from shard_histograms_files;

create or replace view histograms as
select f.layer, f.hook_point, f.neuron, f.concept, f.bin, f.n, bin_lower(f.bin) as lower, bin_upper(f.bin) as upper
from histograms_files f;

create or replace view activations as
select f.layer, f.hook_point, f.neuron, f.sample, f.position, f.concept, f.value from raw_files f;

create or replace view moments as
select f.layer, f.hook_point, f.neuron, f.concept, f.n, f.n_nonfinite, f.mean, f.std, f.skewness, f.kurtosis, f.min, f.max, f.mean_abs
from moments_files f;

create or replace view distributions as
select f.layer, f.hook_point, f.neuron, f.concept, f.ks, f.ks_bound, f.p01, f.p05, f.p25, f.p50, f.p75, f.p95, f.p99
from distributions_files f;

create or replace view overlap as
select f.layer, f.hook_point, f.neuron, f.concept_a, f.concept_b, f.tau, f.ovl, f.ovl_gaussian,
    f.bhattacharyya, f.range_jaccard, f.b_in_a, f.a_in_b
from overlap_files f;

create or replace view salience as
select f.layer, f.hook_point, f.neuron, f.concept, f.method, f.score, f.rank from salience_files f;

-- Where every table is of method paper, the files lack the columns of pieces.
create or replace view ranges as
select regexp_extract(filename, 'tbl_\w+') as table_id,
    hook_point, layer, neuron, concept, n, mean, std, mean_abs, salience, rank, lower, upper, piece, posterior
from (select null::smallint as piece, null::double as posterior where false union all by name from ranges_files);

create or replace view evaluations as
select parse_filename(filename, true) as evaluation_id, "table" as table_id, edit.action as action, edit.factor as factor,
    edit."value" as "value", edit.layers as layers, edit.hook_points as hook_points, edit.tau as edit_tau, edit.top_fraction as edit_top_fraction, n_texts,
    unnest("rows", recursive := true)
from evaluations_files;
