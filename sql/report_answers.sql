-- How often does the model answer right, concept by concept?
-- in: samples      out: one row per concept whose answers were recorded: texts, share right, mean probability of the right answer
select concept, count(correct) as n_answered, avg(correct::integer) as accuracy, avg(confidence)::double as confidence
from samples
where correct is not null
group by concept
order by concept;
