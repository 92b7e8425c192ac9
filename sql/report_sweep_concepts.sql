-- What does one setting take from each concept when it is the target, and what from the others?
-- in: evaluations, $evaluation_id, $setting
-- out: one row per target and condition but base, in the order of the concepts' names
select concept, condition, target_drop, target_drop_low, target_drop_high, complement_drop, complement_drop_low,
    complement_drop_high, selectivity, selectivity_low, selectivity_high, kl_target, kl_complement, n_target, n_complement
from evaluations
where evaluation_id = $evaluation_id and setting = $setting and concept is not null and condition <> 'base'
order by concept,
    array_position(['neuron', 'range', 'random', 'wrong_concept', 'shuffled', 'length_matched'], condition);
