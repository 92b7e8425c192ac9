-- What does each setting that was evaluated take from the target, and what from the others?
-- in: evaluations
-- out: one row per setting and condition but base: the means over concepts, and what the setting is. `texts` numbers the sets of
--     test texts from 1, the largest first. Old evaluations, which do not say their texts, stand alone.
with bare as (
    select evaluation_id, any_value(n_texts) as n_texts, avg(target_confidence) as bare_confidence,
        coalesce(any_value(texts_hash), evaluation_id) as told
    from evaluations
    where condition = 'base' and concept is not null and setting = 0
    group by evaluation_id
),
first as (
    select told, max(n_texts) as n_texts, min(evaluation_id) as evaluation_id from bare group by told
),
numbered as (
    select told, row_number() over (order by n_texts desc, evaluation_id) as texts from first
)
select n.texts, b.n_texts, b.bare_confidence, e.evaluation_id, e.setting, e.condition, e.control, e.table_id,
    e.tau, e.top_fraction, e.layers, e.hook_points, e.salience, e."method", e.mass, e.penalty, e.budget,
    e.action, e.factor, e."value", e.positions,
    e.target_drop, e.target_drop_low, e.target_drop_high, e.complement_drop, e.complement_drop_low, e.complement_drop_high,
    e.selectivity, e.selectivity_low, e.selectivity_high, e.kl_target, e.kl_complement, e.changed_share,
    e.off_task_perplexity, e.off_task_kl, e.choice_accuracy
from evaluations e
join bare b using (evaluation_id)
join numbered n using (told)
where e.concept is null and e.condition <> 'base'
order by n.texts, e.evaluation_id, e.setting,
    array_position(['neuron', 'range', 'random', 'wrong_concept', 'shuffled', 'length_matched'], e.condition);
