-- What does a store hold, and which files stand behind each table? Run this first: it makes every relation exist, empty.
-- in: nothing      out: one empty view KIND_files per kind of file, with the columns and types of docs/store-format.md
--
-- `neuronlens views STORE` prints all that a plain DuckDB session needs: macros.sql, this file, one line per kind that the store
-- has, such as
--     create or replace view moments_files as from read_parquet(['STORE/moments/mlp_post.000.0123456789ab.parquet', ...]);
-- with the files that the receipts name (a glob would also take files that no receipt names), then views.sql, analysis.sql,
-- functions.sql and comments.sql.

create or replace view plan_files as
select null::integer as shard, null::varchar as concept, null::bigint as n_samples, null::bigint as n_tokens,
    null::integer as n_batches, null::varchar as samples_file, null::integer as row_group
limit 0;

create or replace view samples_files as
select null::bigint as sample, null::integer as shard, null::integer as batch, null::varchar as concept, null::bigint as "row",
    null::integer as n_tokens, null::boolean as truncated, null::varchar as text, null::integer[] as token_ids
limit 0;

-- The receipts of the shards, as JSON: connect() reads these columns and leaves the others.
create or replace view commits_files as
select null::varchar as shard, null::varchar as attempt, null::bigint as n_truncated, null::bigint as n_nonfinite,
    null::struct(total double) as seconds, null::varchar as finished_at
limit 0;

create or replace view partials_files as
select null::smallint as layer, null::varchar as hook_point, null::integer as neuron, null::varchar as concept,
    null::bigint as n, null::bigint as n_nonfinite, null::double as mean,
    null::double as m2, null::double as m3, null::double as m4,
    null::float as min, null::float as max, null::double as mean_abs, null::varchar as filename
limit 0;

-- Counts of one shard each: its number stands in the path.
create or replace view shard_histograms_files as
select null::smallint as layer, null::varchar as hook_point, null::integer as neuron, null::varchar as concept,
    null::smallint as bin, null::bigint as n, null::varchar as filename
limit 0;

-- The merged histograms of the statistics stage; in a store without them, those of the shards.
create or replace view histograms_files as
select null::smallint as layer, null::varchar as hook_point, null::integer as neuron, null::varchar as concept,
    null::smallint as bin, null::bigint as n
limit 0;

create or replace view predictions_files as
select null::bigint as sample, null::varchar as predicted, null::boolean as correct, null::float as confidence
limit 0;

-- hook_point and layer come from the path (raw/hook_point=mlp_post/layer=3/), so that a query opens only the files that it
-- needs; DuckDB reads a number in a path as BIGINT, and a cast in the view would open every file again.
create or replace view raw_files as
select null::bigint as layer, null::varchar as hook_point, null::integer as neuron, null::bigint as sample,
    null::integer as position, null::varchar as concept, null::float as value
limit 0;

create or replace view moments_files as
select null::smallint as layer, null::varchar as hook_point, null::integer as neuron, null::varchar as concept,
    null::bigint as n, null::bigint as n_nonfinite, null::double as mean, null::double as std,
    null::double as skewness, null::double as kurtosis, null::float as min, null::float as max, null::double as mean_abs
limit 0;

create or replace view distributions_files as
select null::smallint as layer, null::varchar as hook_point, null::integer as neuron, null::varchar as concept,
    null::float as ks, null::float as ks_bound, null::float as p01, null::float as p05, null::float as p25,
    null::float as p50, null::float as p75, null::float as p95, null::float as p99
limit 0;

create or replace view overlap_files as
select null::smallint as layer, null::varchar as hook_point, null::integer as neuron,
    null::varchar as concept_a, null::varchar as concept_b, null::float as tau, null::float as ovl, null::float as ovl_gaussian,
    null::float as bhattacharyya, null::float as range_jaccard, null::float as b_in_a, null::float as a_in_b
limit 0;

create or replace view salience_files as
select null::smallint as layer, null::varchar as hook_point, null::integer as neuron, null::varchar as concept,
    null::varchar as method, null::double as score, null::integer as rank
limit 0;

-- Several tables may lie in one store; the path says which table a row belongs to. Only those of another method than paper have
-- piece, posterior and mean_others: read them with union_by_name = true, and where none has them, views.sql adds them.
create or replace view ranges_files as
select null::varchar as filename,
    null::varchar as hook_point, null::smallint as layer, null::integer as neuron, null::varchar as concept,
    null::bigint as n, null::double as mean, null::double as std, null::double as mean_abs,
    null::double as salience, null::integer as rank, null::double as lower, null::double as upper,
    null::smallint as piece, null::double as posterior, null::double as mean_others
limit 0;

-- One JSON file per evaluation or sweep, with a row per setting, concept and condition.
create or replace view evaluations_files as
select null::varchar as "filename", null::varchar as "table", null::bigint as n_texts, null::varchar as texts_hash,
    null::struct(action varchar, factor double, "value" double, layers integer[], hook_points varchar[], tau double,
        top_fraction double) as edit,
    null::struct(setting integer, table_id varchar, concept varchar, condition varchar, control varchar,
        tau double, top_fraction double, layers integer[], hook_points varchar[], salience varchar, "method" varchar,
        mass double, penalty double, budget double, action varchar, factor double, "value" double, positions varchar,
        target_accuracy double, target_accuracy_low double, target_accuracy_high double, target_confidence double,
        complement_accuracy double, complement_accuracy_low double, complement_accuracy_high double,
        complement_confidence double, n_target bigint, n_complement bigint, perplexity double,
        tested bigint, changed bigint, changed_share double, counted varchar, kl_target double, kl_complement double,
        target_drop double, target_drop_low double, target_drop_high double,
        complement_drop double, complement_drop_low double, complement_drop_high double,
        selectivity double, selectivity_low double, selectivity_high double,
        target_accuracy_drop double, target_accuracy_drop_low double, target_accuracy_drop_high double,
        complement_accuracy_drop double, complement_accuracy_drop_low double, complement_accuracy_drop_high double,
        selectivity_accuracy double, selectivity_accuracy_low double, selectivity_accuracy_high double,
        off_task_perplexity double, off_task_kl double,
        choice_accuracy double, choice_accuracy_low double, choice_accuracy_high double)[] as "rows"
limit 0;

-- One JSON file per evaluation by what the model writes, with a row per concept and condition.
create or replace view generations_files as
select null::varchar as "filename", null::varchar as "table", null::bigint as n_prompts,
    null::struct(action varchar, factor double, "value" double, layers integer[], hook_points varchar[], tau double,
        top_fraction double) as edit,
    null::struct(classifier varchar, n_tokens integer, prompt_tokens integer, temperature double, seed bigint) as generation,
    null::struct(concept varchar, condition varchar, n_target bigint, n_complement bigint,
        tested bigint, changed bigint, changed_share double,
        target_probability double, target_probability_low double, target_probability_high double,
        complement_probability double, complement_probability_low double, complement_probability_high double,
        target_drop double, target_drop_low double, target_drop_high double,
        complement_drop double, complement_drop_low double, complement_drop_high double,
        selectivity double, selectivity_low double, selectivity_high double,
        target_share double, target_share_low double, target_share_high double,
        complement_share double, complement_share_low double, complement_share_high double,
        perplexity double, distinct_2 double, n_tokens double,
        examples struct(prompt varchar, continuation varchar, probability double)[])[] as "rows"
limit 0;
