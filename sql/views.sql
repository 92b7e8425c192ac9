-- What may a person ask of a store? The views that every other query reads.
-- in: the KIND_files views of schema.sql, each replaced by the store's files of that kind where it has any
-- out: samples, shards, partials, shard_histograms, histograms, activations, moments, distributions, overlap, salience, ranges,
--     evaluations, generations
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
    hook_point, layer, neuron, concept, n, mean, std, mean_abs, salience, rank, lower, upper, piece, posterior, mean_others
from (select null::smallint as piece, null::double as posterior, null::double as mean_others where false union all by name from ranges_files);

-- Rows say of what they are since there are sweeps; older ones leave it to their file.
create or replace view evaluations as
with row_of_file as (
    select regexp_replace(parse_filename(filename, true), '\.part\d+$', '') as evaluation_id, "table", edit, n_texts, texts_hash,
        unnest("rows") as r
    from evaluations_files
)
select evaluation_id, coalesce(r.setting, 0) as setting, coalesce(r.table_id, "table") as table_id,
    coalesce(r.action, edit.action) as action, if(r.action is null, edit.factor, r.factor) as factor,
    if(r.action is null, edit."value", r."value") as "value", if(r.action is null, edit.layers, r.layers) as layers,
    if(r.action is null, edit.hook_points, r.hook_points) as hook_points, edit.tau as edit_tau,
    edit.top_fraction as edit_top_fraction, n_texts, texts_hash, r.tau, r.top_fraction, r.salience, r."method", r.mass, r.penalty, r.budget,
    coalesce(r.positions, 'all') as positions, r.concept, r.condition, r.control,
    r.target_accuracy, r.target_accuracy_low, r.target_accuracy_high, r.target_confidence,
    r.complement_accuracy, r.complement_accuracy_low, r.complement_accuracy_high, r.complement_confidence,
    r.n_target, r.n_complement, r.perplexity, r.tested, r.changed,
    coalesce(r.changed_share, r.changed / nullif(r.tested, 0)) as changed_share, coalesce(r.counted, 'all') as counted,
    r.kl_target, r.kl_complement, r.target_drop, r.target_drop_low, r.target_drop_high,
    r.complement_drop, r.complement_drop_low, r.complement_drop_high, r.selectivity, r.selectivity_low, r.selectivity_high,
    r.target_accuracy_drop, r.target_accuracy_drop_low, r.target_accuracy_drop_high,
    r.complement_accuracy_drop, r.complement_accuracy_drop_low, r.complement_accuracy_drop_high,
    r.selectivity_accuracy, r.selectivity_accuracy_low, r.selectivity_accuracy_high,
    r.off_task_perplexity, r.off_task_kl, r.choice_accuracy, r.choice_accuracy_low, r.choice_accuracy_high
from row_of_file;

create or replace view generations as
with row_of_file as (
    select parse_filename(filename, true) as generation_id, "table" as table_id, edit, generation, n_prompts, unnest("rows") as r
    from generations_files
)
select generation_id, table_id, edit.action, edit.factor, edit."value", edit.layers, edit.hook_points,
    edit.tau as edit_tau, edit.top_fraction as edit_top_fraction, generation.classifier, n_prompts, generation.prompt_tokens, generation.n_tokens as max_tokens, generation.temperature, generation.seed,
    r.concept, r.condition, r.n_target, r.n_complement,
    r.target_probability, r.target_probability_low, r.target_probability_high,
    r.complement_probability, r.complement_probability_low, r.complement_probability_high,
    r.target_drop, r.target_drop_low, r.target_drop_high, r.complement_drop, r.complement_drop_low, r.complement_drop_high,
    r.selectivity, r.selectivity_low, r.selectivity_high, r.target_share, r.target_share_low, r.target_share_high,
    r.complement_share, r.complement_share_low, r.complement_share_high, r.perplexity, r.distinct_2, r.n_tokens,
    r.tested, r.changed, r.changed_share, r.examples
from row_of_file;
