-- What did each intervention erase, and what did it spare?
-- in: evaluations
-- out: its rows, evaluation by evaluation and setting by setting; the means over concepts (concept NULL) after each setting's
--     concepts. Accuracies with their 95 % interval (Wilson 1927), drops and selectivities with that of a paired bootstrap.
select table_id, action, factor, "value", layers, edit_tau, edit_top_fraction, n_texts, concept, condition,
    target_accuracy, target_accuracy_low, target_accuracy_high, target_confidence,
    complement_accuracy, complement_accuracy_low, complement_accuracy_high, complement_confidence,
    n_target, n_complement, perplexity, tested, changed,
    evaluation_id, setting, tau, top_fraction, hook_points, salience, "method", mass, penalty, budget, positions, control, counted,
    changed_share, kl_target, kl_complement, target_drop, target_drop_low, target_drop_high,
    complement_drop, complement_drop_low, complement_drop_high, selectivity, selectivity_low, selectivity_high,
    off_task_perplexity, off_task_kl, choice_accuracy, choice_accuracy_low, choice_accuracy_high
from evaluations
order by table_id, action, factor, "value", layers, edit_tau, edit_top_fraction, n_texts, evaluation_id, setting, concept nulls last,
    array_position(['base', 'neuron', 'range', 'random', 'wrong_concept', 'shuffled', 'length_matched'], condition);
