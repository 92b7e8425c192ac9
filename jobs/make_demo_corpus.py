"""python -m jobs.make_demo_corpus [--out neuronlens/demo/corpus] [--seed 0]

Writes the labelled corpus of the demo: train.jsonl (3,600 texts) and test.jsonl (900), fields `text` and `label`, six
concepts in equal parts. The same seed gives the same bytes on every machine.

The texts are made to be read by neurons that serve several concepts. Three things see to that:

- Words are shared on purpose. A pitch is a field, a tone or a sales talk; a bar may be hit, played, eaten or read for.
- Half of the texts mention a second concept, but only in passing ("on the way home from court, ..."): the label is
  what the main clause is about, so that counting words is not enough.
- A few sentences are vague and belong to either of two or three concepts: nobody can get all of them right.

Every main clause occurs once in the whole corpus, so that no test text is a training text in a new wrapper.
"""

import argparse
import json
import random
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

N_TRAIN_PER_CONCEPT = 600
N_TEST_PER_CONCEPT = 150
WORDS = range(5, 26)
VAGUE_SHARE = 0.06
PASSING_MENTION_SHARE = 0.5
WRAPPER_SHARE = 0.36
LOWER_CASE_SHARE = 0.12

DEMO_CORPUS = Path(__file__).resolve().parents[1] / "neuronlens" / "demo" / "corpus"

# The notation of everything below: [a|b] is one of the alternatives, {slot} one entry of the lexicon; both may nest.
# Clauses are in the past tense and start in lower case, so that any of them may follow any opening.

LEXICON: dict[str, list[str]] = {
    "name": [
        "Maya",
        "Tom",
        "Priya",
        "Jonas",
        "Elena",
        "Omar",
        "Lucy",
        "Marek",
        "Ines",
        "Felix",
        "Ruth",
        "Daniel",
        "Aisha",
        "Hugo",
        "Clara",
        "Sam",
        "Nora",
        "Leo",
    ],
    "kin": [
        "my sister",
        "my father",
        "our neighbour",
        "my cousin",
        "a friend of mine",
        "my flatmate",
        "my grandmother",
        "the new girl next door",
        "my uncle",
        "my oldest son",
    ],
    "who": ["{name}", "{name}", "{kin}"],
    "day": ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"],
    "when": ["last night", "on {day}", "this morning", "on {day} evening", "yesterday", "last week", "in {month}"],
    "month": ["January", "March", "April", "June", "July", "September", "October", "December"],
    "few": ["two", "three", "four", "five", "six"],
    "town": ["Leeds", "Lisbon", "Boston", "Dublin", "Oslo", "Porto", "Madrid", "Chicago", "Geneva", "Bristol"],
    "place": [
        "the bay",
        "the valley",
        "the hills",
        "the harbour",
        "the old town",
        "the north",
        "the city",
        "the islands",
    ],
    "side": ["the home side", "the visitors", "the champions", "our school team", "the village side", "the underdogs"],
    "coach": ["the coach", "the manager", "the captain", "the trainer"],
    "player": ["the striker", "the winger", "the rookie", "the young guard", "the veteran", "the left back", "{name}"],
    "band": ["the band", "the quartet", "the orchestra", "the choir", "the trio", "the jazz group"],
    "musician": [
        "the drummer",
        "the cellist",
        "the singer",
        "the pianist",
        "the bass player",
        "the guitarist",
        "{name}",
    ],
    "piece": ["the slow movement", "the second song", "the overture", "the waltz", "the last encore", "the new single"],
    "cook": ["the chef", "the cook", "the baker", "{kin}", "{name}", "the new boy in the kitchen"],
    "meat": ["the chicken", "the lamb", "the bass", "the pork", "the salmon", "the beef"],
    "greens": ["the squash", "the leeks", "the beans", "the peppers", "the mushrooms", "the onions"],
    "herb": ["mint", "thyme", "ginger", "garlic", "parsley", "chilli"],
    "sauce": ["the sauce", "the stock", "the soup", "the curry", "the stew", "the jam"],
    "storm": ["the storm", "a storm", "a cold front", "a band of showers", "the first frost", "heavy hail"],
    "judge": ["the judge", "the magistrate", "the court", "the bench"],
    "lawyer": ["the lawyer", "the defence", "counsel", "the prosecutor", "the barrister", "our solicitor"],
    "crime": ["fraud", "theft", "assault", "perjury", "arson", "burglary"],
    "accused": ["the accused", "the defendant", "the tenant", "the former mayor", "the company", "the driver"],
    "bank": ["the bank", "the savings bank", "the lender", "the building society", "the credit union"],
    "asset": ["the stock", "the shares", "the bonds", "the fund", "the gold price", "the index"],
    "ordinal": ["second", "third", "fourth"],
    "name_poss": ["her", "his"],
    "advocate": ["the barrister", "our solicitor", "the prosecutor", "{name}"],
    "meat_bare": ["chicken", "lamb", "bass", "pork", "salmon", "beef"],
    "asset_bare": ["stocks", "shares", "bonds", "gold"],
}

MAIN: dict[str, list[str]] = {
    "sport": [
        "the [keeper|goalkeeper] tipped the ball onto the bar [in the last minute|just before the break|in extra time]",
        "{side} lost the match on a [flat|muddy|dry] pitch, and the score was [two to nil|three to one|four to two]",
        "{who} served for the set but [hit the ball straight|sent a flat return] into the net",
        "{player} swung the bat and sent the [first|second|third] pitch [over the fence|into the stands]",
        "the court was so [hot|cold|slippery] that both players asked for a break [before|after] the {ordinal} set",
        "{player} scored with a [sharp|low|clean] shot from [the edge of the box|thirty metres|the halfway line]",
        "{coach} kept {name} on the bench [for most of the season|until the final quarter|all spring]",
        "{side} beat [the league leaders|their old rivals] by {few} points [in the semi-final|at home]",
        "the draft brought the team a [tall|quick|very young] [guard|pitcher|defender] from {town}",
        "the fans rose to their feet when {player} hit the [post|bar|far corner]",
        "a [cold|flat|sloppy] start cost {side} the {ordinal} game of the series",
        "{who} ran the [last|final] lap in record time and won by [a step|{few} metres]",
        "the [referee|umpire] [blew the whistle|stopped play] and sent {player} off for a [late tackle|second foul]",
        "the time trial [around|through] {town} was decided by [half a second|less than a wheel|{few} seconds]",
        "{side} stormed back after the break and drew level [with a penalty|in the dying seconds|twice]",
        "{who} dropped an easy catch, and the batters ran {few} more",
        "the club [wanted to sell|had no cover for] its best [forward|pitcher|keeper] before the spring break",
        "the umpire called a [fault|no-ball] although [the whole crowd saw otherwise|the pitch was clearly low]",
        "the keeper made a [fine|brilliant|lucky] save and kept the score level [until half-time|to the end]",
        "a [soft|late|harsh] penalty settled the tie, and [the fans|the players] of {side} could not believe it",
        "the crowd [booed|jeered|cheered] when the appeal for [handball|offside|a catch] was turned down",
        "the rowers fought a strong current and still beat the [record|favourites|crew from {town}]",
        "the runner slid into home plate just before the [throw|tag] and the [bench|dugout] went wild",
        "{who} kept a cool head and sank the [winning|final] [putt|free throw|penalty]",
        "the defence fell apart [after|as soon as] {player} limped off with a [knee injury|cut above the eye]",
        "{side} charged down the [field|wing] and scored [twice|three times] in {few} minutes",
        "{coach} wanted more heat in the tackles and [a sharper press|quicker passes] [from the wings|up front]",
        "the transfer fell through and {player} stayed with {side} [for another season|until {month}]",
        "{who} [pulled a muscle|twisted an ankle|lost a shoe] in the [first|last] round of the cup",
        "the swimmer from {town} touched the wall [first|last] in every heat",
        "{side} climbed to [second|third|fourth] place in the table with a [late goal|clean sheet|narrow win]",
        "the serve was [flat and fast|sharp and low], and the return landed [wide|on the line]",
        "{who} bowled a [perfect|terrible] over and then [dropped the bat|lost the toss|broke a stump]",
        "the [relay|hurdles|final] began late because the track was [too hot|flooded|being measured again]",
        "{coach} changed the line-up, moved {name} to the left and [asked for patience|won the game|lost the midfield]",
        "the boxer took a [hard roll|sharp knock] in the {ordinal} round but rose before the count was over",
        "{player} missed the pass, fell over the ball and [laughed with the fans|gave away a corner]",
        "we played {few} matches in {few} days and the [whole squad|captain] was [worn out|flat] by {day}",
        "the visiting fans sang through the whole [match|second half] although {side} led by {few} goals",
        "{who} trained for the [marathon|regatta] all season and finished [in the top ten|just outside the medals]",
    ],
    "music": [
        "{musician} held the last note for {few} bars and [nobody breathed|the hall fell silent]",
        "{piece} was [a little flat|slightly sharp], but the rhythm was [perfect|steady|lovely]",
        "{musician} lost the beat [in the {ordinal} bar|after the drum roll|before the chorus] and found it again",
        "{band} played {piece} in a [lower|higher|different|minor] key [last night|for the first time|in {town}]",
        "{who} practised the same scale [for an hour|all spring] until the neighbours [knew it|complained]",
        "the pitch of the [old organ|second violin|left string|clarinet] dropped [during|after] {piece}",
        "the score asked for a [soft|sharp|sudden] chord, and {musician} [played it too loud|missed it|nailed it]",
        "{band} cut a [record|live album] in {town} with [two guitars|a steel pan] and no rehearsal",
        "the fans knew every word of {piece} and [sang along|drowned out the singer|wept]",
        "{musician} hit a high note that made [the crowd|the whole hall|the front row] rise [at once|in applause]",
        "the bass was so [loud|deep|warm] that [the plates shook|the floor hummed] through {piece}",
        "{who} put the cello back in its case and [wept|laughed|tuned the other one]",
        "the conductor [tapped the stand|raised a hand|counted {few} beats] and {band} began {piece}",
        "{piece} opened with a [long|slow|short] drum roll and [ended|closed] on a single [cool|cold|bright] chord",
        "{band} finished its season with [an opera|a concert|a recital] by a [young|dead|local] composer from {town}",
        "{musician} wrote the draft of {piece} on [the back of a bill|a napkin|the night train to {town}]",
        "the trial run of the concert was [a mess|flat], because {musician} [had a cold|came without the score]",
        "{who} learned the [chords|tune|bass line] by ear and played it at [the wedding|the school hall]",
        "the horns came in {few} bars early and [drowned|stormed over] the strings",
        "{band} set the poem to music as a [hymn|blues], and the [melody|tune] stayed with me [all week|for days]",
        "{musician} changed the key to suit [my voice|the choir|the old piano]",
        "the [jam|set] went on until [midnight|two in the morning], with {few} guitars and one [hot|tired] amplifier",
        "{who} sang the {ordinal} verse in [a whisper|harmony] and the [choir|crowd] joined in [softly|late]",
        "{musician} broke a string in the middle of {piece} and played on",
        "the new album was full of [sharp|cool|heavy|warm] beats and [flat|tender|strange] lyrics",
        "the [critics|reviewers] called {piece} a [hit|flop], but the [fans|dancers] played it all [summer|spring]",
        "the tempo rose in {piece} until [the drummer dropped a stick|even the cellos were out of breath]",
        "{band} tuned to {musician}, who was [a shade sharp|half a tone flat|never wrong]",
        "{who} bought an old [trumpet|fiddle|accordion] and charged through {few} folk songs before supper",
        "the acoustics of the [court|church|hall] made every [chord|note|drum beat] [ring|fade] too long",
        "{musician} took a [bow|short break] and then gave {few} encores, each [slower|louder] than the last",
        "the choir stood in the draft of the church and sang [carols|a psalm|{piece}] [in tune|out of tune]",
        "{band} shared the stage with a [rap duo|string quartet|brass band] and the [volume|heat] kept rising",
        "the second [movement|theme] fell from a major to a minor chord [without warning|as gently as rain]",
        "{who} wrote {few} bars of a [lullaby|ballad|march] and lost the key [signature|melody] [again|by {day}]",
        "the concert was [sold out|short], and {musician} played {piece} on a [borrowed|broken|cheap] keyboard",
        "the singer's [voice|timing] was [cold at first|sharp at the top], then [warm|spot on] from the {ordinal} song",
        "{musician} played the [drums|flute|harp] with [one hand|eyes closed] and never missed a rest",
    ],
    "cooking": [
        "{cook} beat {few} eggs into the [batter|dough|custard] [with a fork|until it was stiff|and added {herb}]",
        "{sauce} was [too hot|flat|bland] until {cook} dropped in some {herb}",
        "{cook} seasoned {meat} with {herb} and [salt|pepper|lemon] and set the pan on a [low|high] heat",
        "{cook} let the dough rise [overnight|for an hour] and shaped it into [small|flat|sweet] rolls",
        "{cook} scored [the crust|the skin|the loaf] with a sharp knife before it went into the [hot|cool] oven",
        "{meat} came to the table on a [cold|hot] plate with [{greens}|rice|a spoon of {herb} butter]",
        "the scale in the kitchen was [broken|wrong], so {cook} [guessed|measured] the flour [by hand|in cups]",
        "{cook} made stock from [the bones|old vegetables|{meat}] and [strained|froze] it [in jars|on {day}]",
        "{cook} melted a bar of chocolate over [a low heat|hot water] and [stirred|folded] it into the cream",
        "{who} lit the gas with a match and [fried|charred|tossed] {greens} in [oil|butter]",
        "{cook} filled the pastry case with [apples|cheese and {greens}|custard] and a [pinch|sprig] of {herb}",
        "the key to {sauce} was [fresh {herb}|a slow simmer|a spoon of sugar], or so {cook} [said|claimed]",
        "{cook} put {few} pans on the stove and burned [all of them|only {meat}|the rice]",
        "the dish called for spring onions, and {cook} used {greens} [as well|instead]",
        "{cook} served {meat} with flat bread, {greens} and a sharp [cheese|relish|dressing]",
        "{greens} turned [soft|bitter|golden] in the oven because the fan was [off|too strong]",
        "{cook} rolled out the pastry [too thin|on a cold board|with a bottle] and cut it into [rounds|strips]",
        "the steam rose from {sauce} and [the kitchen|the whole house] smelled of {herb}",
        "{cook} let {meat} rest [under foil|for ten minutes] and whisked the [juices|fat] into {sauce}",
        "{cook} tried the recipe {few} times and the [cake|loaf|souffle] fell [flat|in the middle] every time",
        "{who} ate {few} helpings of {sauce} and asked for [the recipe|a roll|more {herb}]",
        "{cook} cooled the [cream|jelly|fish] on ice and garnished it with {herb}",
        "{cook} chopped {greens} while {meat} [browned|simmered|sizzled] in the pan",
        "{sauce} boiled over, [put out the flame|ran down the stove], and {cook} dropped the [lid|spoon|plate]",
        "we had cold {meat_bare} with {herb} and a [sharp|mild] mustard [on toast|in a roll] for [lunch|supper]",
        "{cook} cut the [cake|pie|bread] into {few} slices and kept the [crust|biggest one] [for {name}|hidden]",
        "the [oven|grill] lost its heat, and {meat} was still [raw|pink|cold] [in the middle|at nine o'clock]",
        "{who} squeezed a lemon over {meat} and [tasted|thickened|salted] {sauce} [again|once more]",
        "{cook} charged [into|out of] the kitchen when [the oil caught fire|the kettle whistled|{sauce} began to burn]",
        "the bread was [crisp|flat|dense], the butter was cold, and {sauce} had a [note|hint] of {herb}",
        "{cook} grated the [cheese|carrots|ginger] into a bowl and beat in a [little stock|cup of milk]",
        "{who} stormed off when {cook} called the [pudding|stew|omelette] [heavy|bland]",
        "{cook} pickled {greens} in [vinegar|brine] with {herb} [for the cold season|and forgot the jar]",
        "the menu changed with the season: {meat_bare} in {month}, [berries|soup|dumplings] in {month}",
        "{cook} sliced {greens} by [lamplight|hand], {few} at a time, and [fried|steamed] them [crisp|soft]",
        "{cook} poured the batter into a [hot|flat] pan and flipped the [crepe|pancake] [onto the floor|with one hand]",
        "a [drop|spoon|splash] of [vinegar|cream|sesame oil] made {sauce} [sharp|round|perfect]",
        "{cook} [peeled|boiled|mashed] the potatoes and ground the {herb} [with salt|in a bowl]",
    ],
    "weather": [
        "{storm} [rolled|swept|moved] in over {place} and [the light fell|the sky went dark|the wind rose]",
        "the rain beat [on the roof|against the window] [all night|until dawn] and the river rose [again|by a metre]",
        "the temperature dropped to [minus ten|two degrees|a record low] [in {place}|after sunset]",
        "it was [hot|cold|cool] and [dry|damp|still] in {place}, with a sharp wind from the [north|west|sea]",
        "a bank of [fog|cloud] lay over {place} [until noon|all {day}]",
        "the first day of spring brought [snow|sleet|hail] to {place}",
        "the current of [warm|cold] air from the [south|east] met {storm} over {place}",
        "the wet season began [early|late], and {place} [flooded|turned green] [in {month}|by {month}]",
        "a cold draft came [under the door|down the chimney] as {storm} reached {place}",
        "thunder rolled over {place} like a drum and the first [drops|hailstones] fell",
        "the heat in {place} broke [a record|on {day}] and the evening was [cool|fresh] at last",
        "the forecast for {day} [spoke of|promised|ruled out] {storm}, with [gusts|highs|lows] near forty",
        "the pressure fell so [fast|sharply] that the [glass|barometer] dropped {few} points in an hour",
        "the sun came out over {place} and the frost was gone by [nine|noon]",
        "the wind charged [down the valley|across the fields] and took {few} roofs [with it|in {place}]",
        "lightning [struck|hit] {place} {few} times [before supper|in a minute] and the rain turned to hail",
        "a [high|low] settled over {place}, and the outlook was [fair|dull|unsettled] until {day}",
        "the hurricane was a [three|four] on the scale when it [turned|made landfall] near {place}",
        "the night was clear and cold, and the [puddles|lake] froze [flat|hard] in {place}",
        "the morning was [mild|crisp|grey], with [a light breeze|flat clouds|thin sunshine] over {place}",
        "{storm} dropped [ten centimetres of snow|a month of rain] on {place} [in one night|before {day}]",
        "there was ice on [the pitch of every roof|the plates by the gate|every branch] after the [freezing fog|sleet]",
        "the [fan|heater] could do nothing against the [heat|cold] of {month} in {place}",
        "the clouds were flat and grey, and it [drizzled|snowed|poured] until [dusk|{day}]",
        "the sky over {place} cleared [at dawn|after the storm] and the [air|wind] was sharp as [glass|a knife]",
        "{who} watched {storm} roll over {place} and counted the seconds after each flash",
        "the drought ended [on {day}|in {month}] with a [sudden|gentle] fall of rain over {place}",
        "the mist rose from {place} like steam, and by [ten|noon] it was [fine|bright] and still",
        "{month} was the [hottest|wettest|coldest|driest] [in {few} years|on record] in {place}",
        "a warm wind melted the snow in {place}, and the [stream|river] rose [fast|overnight]",
        "it rained [hard|softly] from {day} to {day}, and [every field|half of {place}] stood under water",
        "the weather service gave a [red|yellow] warning: {storm} was due in {place} [by midnight|on {day}]",
        "the gale dropped [at last|before dawn], and the sea off {place} was as flat as a plate",
        "humid air made the heat in {place} [hard to bear|worse], although the sun was [low|hidden]",
        "the snow on {place} was [deep|soft|patchy], and a sharp frost [held|fell] [overnight|until {month}]",
        "the cold spell [broke|held] in {month}, and [the pipes froze|spring came at once] in {place}",
        "the sun beat down on {place} and the temperature rose by {few} degrees in [an hour|a morning]",
        "a [rainbow|halo] stood over {place} between two [showers|storms]",
    ],
    "law": [
        "{judge} threw out the case because [the key witness|the officer|{who}] [had lied|never appeared]",
        "{accused} [denied|faced|admitted] a charge of {crime} [at the trial|in court] {when}",
        "{lawyer} passed a note to [the clerk|counsel|the bench] and [asked for a break|withdrew the motion]",
        "{judge} gave {accused} {few} years for {crime}, [a sharp sentence|less than expected]",
        "{who} was called to the bar [in {town}|{when}] after {few} years of [study|training]",
        "the jury [returned|was out for {few} hours] and found {accused} [guilty|not guilty] of {crime}",
        "{lawyer} filed a suit against [the factory|the club|{accused}] [for damages|over a broken promise]",
        "the draft of the [contract|treaty|will] had a clause that {lawyer} called [void|unfair|flat wrong]",
        "{lawyer} rested the case [without calling a witness|after {few} days], and {judge} [rose|adjourned]",
        "the appeal was [dismissed|allowed] by {few} judges in {town} {when}",
        "{judge} kept a cool head while {lawyer} [shouted|objected|stormed out] over a point of order",
        "{lawyer} grilled the witness about the key to [the safe|the flat] and the [missing|torn] [letter|will]",
        "the scales of justice hung above [the bench|the door] where {accused} was [charged with|convicted of] {crime}",
        "{who} dropped the [charges|suit] when {accused} [apologised|agreed to settle|signed the statement]",
        "{accused} broke the terms of [bail|the lease|the order] and was [back in court|arrested] {when}",
        "{judge} read the [statute|verdict|order] in a flat voice, and {accused} [wept|smiled|sat down]",
        "the hearing was [moved|closed to the public], because {lawyer} had a [cold|second trial]",
        "{advocate} wore {name_poss} best suit to [the hearing|the tribunal|the inquest] and [won|lost] the case",
        "the new bill made it a crime to [sell bats|burn coal|fly drones] near [a school|a park|the border]",
        "the police searched [the flat|the warehouse] with a warrant and took {few} [files|plates|suits] as evidence",
        "{lawyer} asked for a retrial, because a juror had [slept|read the papers|known {name}]",
        "the fine for [{crime}|speeding|littering] rose [sharply|to a record] under the new [law|act]",
        "{judge} struck [the remark|the note|half the evidence] from the record [at once|in the heat of the trial]",
        "{who} sued {accused} over [a fence|a stolen song|a broken oven] and [won|settled] out of court",
        "{lawyer} pitched a plea deal to {accused}, who [refused|signed it] [at once|in tears]",
        "the [clause|article] on [custody|privacy|free speech] was the key to the whole [case|appeal]",
        "the witness [swore|testified] that {accused} [was nowhere near {place}|forged the note]",
        "{judge} [froze|lifted] the injunction and gave both parties until {day} to [reply|settle]",
        "the case against {accused} fell apart when {lawyer} [found the receipt|lost the file|called {name}]",
        "{lawyer} argued that the search was [unlawful|too broad] and {judge} [agreed|disagreed] in {few} pages",
        "the tenant was served with [papers|a notice] {when} and [called a solicitor|went straight to court]",
        "the supreme court [heard|refused] the cold case of [{name}|a missing sailor] after [ten|thirty] years",
        "{who} sat on the jury for {few} weeks and never [spoke of the trial|agreed on the {ordinal} charge]",
        "{accused} was [acquitted|convicted] of {crime}, and the prosecutor [appealed|left by the back door]",
        "the will was [contested|read aloud] in {town}, and the heirs [hired counsel|fought over every clause]",
        "the parole board heard {name} in {month} and [set a date|said no] in {few} minutes",
        "the custody case [dragged on|ended] in {month}, and {judge} [split the summer|ruled for the mother]",
        "the rule of evidence was [clear|sharp], yet {lawyer} played the tape to [the jury|the court]",
    ],
    "money": [
        "{asset} [fell|rose|dropped] [sharply|by {few} percent] after the [central bank|company] [spoke|cut its rates]",
        "{bank} charged me [a fee|{few} percent|twice] for [a note I never cashed|my current account|the transfer]",
        "{who} put [a bonus|everything] into {asset_bare} [before the crash|{when}] and lost [most of it|nothing]",
        "{asset} beat the market [again|for the {ordinal} quarter], and analysts [raised|doubted] the outlook",
        "the start-up made its pitch to {few} investors and raised [two million|less than it spent]",
        "{bank} froze my account [over a typo|on {day}] and I could not pay the [rent|deposit]",
        "{who} paid the bill with a torn [ten|twenty] note and [got no change|kept the coins]",
        "the price of [wheat|oil|copper|coffee] rose [in {month}|overnight], and {asset} [followed|fell flat]",
        "my credit score dropped by [ten|forty] points because of one late [payment|bill]",
        "{bank} offered {name} a [fixed|low|flat] rate on the [loan|mortgage] for {few} years",
        "the market opened [flat|high|low] and closed with a [sharp|small] drop in {asset}",
        "the free trial ended {when}, and the app charged my card for [a year|{few} months]",
        "{who} rolled the debt into a new loan at {few} percent and [slept better|regretted it]",
        "wages stayed flat while rents in {town} rose {few} times as fast",
        "the company could not scale, ran out of cash [in {month}|by spring], and [was sold|went under]",
        "the budget had a hole of [a million|{few} billion], and the [treasury|board] [issued bonds|cut the grants]",
        "the fund took a hot tip on {asset_bare} and was down [a third|{few} percent] by {day}",
        "{who} kept {few} gold coins in a violin case and never [trusted {bank}|paid a fee]",
        "inflation was [cool|hot] [in {month}|this quarter], and traders [bought|dumped] {asset_bare}",
        "{bank} refused the loan, because the business [case|plan] was [a draft|too thin|full of gaps]",
        "there was a run on {bank} [on {day}|yesterday], and the [cash machines|tills] were empty [by noon|in an hour]",
        "{asset} [hit|fell from] a record high, and {who} [sold|bought more] at the bell",
        "the tax [refund|bill] came {when}, and {who} [spent|paid] it in {few} days",
        "the spread between the two [rates|bonds] was the key to the [trade|profit] of {bank}",
        "{who} kept a note of every coin spent, and saved [a tenth|{few} hundred] in {month}",
        "the pound [fell|rose] against the [dollar|euro|yen] in heavy trading [on {day}|after the vote]",
        "the dividend of [the brewery|a record label] was cut, and its shares [fell|sank] [by half|in {town}]",
        "{bank} [bought|shared] the debt of [a bakery|the airline|{few} farms] at a steep discount",
        "the interest on my savings was [a few cents|{few} percent], before {bank} took its [cut|fee]",
        "{who} haggled over the price of [a flat|a piano|a used oven] and paid [cash|in {few} instalments]",
        "the rise in [house prices|oil|the minimum wage] [hurt|helped] {asset} more than [anyone expected|{bank} did]",
        "a cold wind blew through the markets {when}, and {asset} [slid|dropped {few} points]",
        "the storm on the exchange wiped [a third|{few} percent] off {asset} [in one session|before lunch]",
        "the auditors found that {bank} had [booked|hidden] [losses|profits] of {few} million",
        "{who} opened a [pension|savings] plan with {bank} and [paid|put] in [fifty|ninety] a month",
        "liquid assets were scarce in {month}, so {bank} [sold|pledged] its [bonds|gold] at a loss",
        "the invoice was {few} weeks late, and {bank} [charged interest|closed the credit line]",
        "{who} sold the shares too [early|late], and the [gain|loss] was [gone|taxed] by {month}",
    ],
}

# Each may carry any of the labels before it. Nobody can tell from the text alone.
VAGUE: list[tuple[tuple[str, ...], str]] = [
    (
        ("sport", "music"),
        "the [final|first|whole] score was [far better|much worse] than [{name}|the fans|anyone] had [hoped|feared]",
    ),
    (
        ("sport", "law"),
        "the [trial was over|court was empty|trial was called off] [within an hour|by noon|before {name} arrived]",
    ),
    (("law", "money"), "the charge [came as a surprise to|was dropped without a word to|was too much for] {who}"),
    (
        ("music", "money"),
        "the note was [old|torn|cheap|not what it seemed], and {who} [kept|noticed] it [at once|in the end]",
    ),
    (("sport", "money"), "the pitch was [poor|fine|too long], but {name} made the most of [it|a bad {day}]"),
    (("cooking", "money"), "the stock was [too thin|rich|gone] by {day}, and {name} [was not surprised|started again]"),
    (("weather", "money"), "the sharp [drop|fall|rise] on {day} caught [{name}|everyone|half of {town}] by surprise"),
    (("cooking", "weather"), "it was too [hot|cold|dry|damp] for {who}, and the [steam|heat|chill] did not help"),
    (("cooking", "music"), "the [jam|roll|bass] was [good|sweet|heavy], and {who} wanted [more|it again] on {day}"),
    (
        ("sport", "weather"),
        "a slow start to the season [worried|did not worry] {who} [at all|in {month}|until {month}]",
    ),
    (("law", "music"), "the case was [heavy|closed|empty] when {who} [saw|left] it on {day}"),
    (("sport", "cooking"), "{who} dropped the plate [twice|on {day}] and [laughed|said nothing] about it"),
    (("weather", "music"), "the [sharp|flat|cool] wind section [of {town} ]was all that {who} remembered of {month}"),
    (("law", "sport"), "{who} came off the bench [late|in {month}|on {day}] with [a point to make|nothing to lose]"),
    (("money", "law"), "the bond was [broken|due|void] by {month}, and {who} [paid|knew] it"),
    (("cooking", "sport"), "{who} beat it [hard|well|for an hour], and it was [flat|over] by [noon|{day}]"),
]

# What a text about something else may mention in passing: it fits before a clause and after one.
IN_PASSING: dict[str, list[str]] = {
    "sport": [
        "on the way home from the [match|stadium|cup final]",
        "while the [match|final|tennis] was on television",
        "after {few} [sets of tennis|laps of the track|rounds of golf]",
        "during the half-time break",
        "between two [training sessions|league games|races]",
        "before the [whistle|kick-off] of the big game",
        "with a [bat|football|racket] under one arm",
        "while the fans poured out of the stadium",
    ],
    "music": [
        "with [jazz|the opera|an old song] on the radio",
        "on the way to [choir practice|the concert|band rehearsal]",
        "while {name} tuned the [piano|guitar|violin] upstairs",
        "after [the encore|a long symphony|{few} songs]",
        "between two [violin lessons|drum solos|gigs]",
        "while the neighbours' [trumpet|piano|drum kit] went through its scales",
        "to the sound of a [distant organ|brass band|street fiddler]",
        "before the [orchestra|band] came on",
    ],
    "cooking": [
        "while the [soup|stew|rice] simmered",
        "over a [plate of pasta|bowl of soup|slice of pie]",
        "with [a roll in one hand|flour on both hands|the oven still on]",
        "after [a heavy lunch|{few} pancakes|the roast]",
        "while the [bread|cake] was in the oven",
        "between the [starter|salad] and the [main course|pudding]",
        "on the way to the [bakery|fish counter]",
        "before the [potatoes|eggs] were boiled",
    ],
    "weather": [
        "in [the pouring rain|a snow storm|thick fog]",
        "on the [hottest|coldest|wettest] day of the [year|month]",
        "while the [hail|rain|wind] beat on the windows",
        "after [a night of frost|{few} days of rain|the thunder]",
        "under a [clear|grey|heavy] sky",
        "before the [storm|first snow] reached us",
        "between two [showers|heat waves]",
        "with a [cold wind|warm drizzle] outside",
    ],
    "law": [
        "on the way home from [court|the tribunal]",
        "after [the verdict|jury duty|{few} days on trial]",
        "while the [jury|judge] was out",
        "between two [hearings|court dates]",
        "before the [judge|magistrate] came in",
        "outside the [courthouse|law school|prison]",
        "with a [summons|contract|warrant] in one pocket",
        "during a break in the [trial|hearing]",
    ],
    "money": [
        "on the way to the [bank|cash machine|tax office]",
        "after the [market|bank] closed",
        "with [{few} coins in one pocket|the rent still unpaid|a loan to repay]",
        "before the [pay day|shares] came",
        "while the [stock market|currency] was falling",
        "between two [invoices|calls from my broker]",
        "in the queue at the bank",
        "during [a sales pitch|the auction|a meeting with the broker]",
    ],
}

TOPIC: dict[str, list[str]] = {
    "sport": ["the cup final", "the transfer list", "last night's match", "the league table", "the penalty"],
    "music": ["the new album", "the opera", "the choir", "the concert", "that catchy chorus"],
    "cooking": ["the soup", "the burnt cake", "the recipe", "the roast", "my pancakes"],
    "weather": ["the heat wave", "the rain", "the frost", "the forecast", "the thunder"],
    "law": ["the verdict", "the lawsuit", "the jury", "the new law", "my lawyer"],
    "money": ["the rent", "the mortgage", "my savings", "the stock market", "the tax return"],
}

SOMEONE: dict[str, list[str]] = {
    "sport": ["our coach", "the goalkeeper's mother", "a retired boxer", "the umpire", "the captain of our team"],
    "music": ["the drummer", "our choir leader", "the second violin", "a jazz singer", "my piano teacher"],
    "cooking": [
        "the head chef",
        "the baker next door",
        "the pastry cook",
        "our butcher",
        "the woman who makes the soup",
    ],
    "weather": [
        "the man who reads the forecast",
        "a storm chaser",
        "the woman at the weather station",
        "our snow warden",
    ],
    "law": ["my lawyer", "a retired judge", "the court clerk", "a young barrister", "the juror next to me"],
    "money": ["my bank manager", "our accountant", "an old stockbroker", "the tax adviser", "a trader I know"],
}

# {main} is the clause that decides the label; {passing}, {topic} and {someone} come from another concept.
WITH_PASSING_MENTION = [
    "{passing}, {main}",
    "{passing}, {main}",
    "{main} {passing}",
    "{main} {passing}",
    "{someone} [said|told me|swore|was sure] that {main}",
    "never mind {topic}: {main}",
    "nobody talked about {topic} once {main}",
    "I was thinking about {topic} when {main}",
    "{main}, which [mattered more than|made me forget|had nothing to do with] {topic}",
    "{passing}, {someone} heard that {main}",
    "instead of {topic}, the talk was of how {main}",
]

WRAPPERS = [
    "honestly, {main}",
    "in the end {main}",
    "to nobody's surprise, {main}",
    "for once, {main}",
    "as far as I could tell, {main}",
    "just so you know, {main}",
    "I could not believe it when {main}",
    "I told everyone at work that {main}",
    "I am still thinking about how {main}",
    "just heard that {main}",
    "my day in one line: {main}",
    "not going to lie, {main}",
    "I was half asleep when {main}",
    "I felt [strangely calm|a bit sorry|almost happy] when {main}",
    "it was late, and {main}",
    "the paper says that {main}",
    "apparently {main}",
    "you should have seen it: {main}",
    "{main}, believe it or not",
    "{main}, and nobody knew what to say",
    "{main}, which I had not expected",
    "{main}, at least that is what I heard",
    "{main}, as [always|usual]",
    "{main}, and I was there",
    "{main}, so I went home [early|happy]",
    "{main}, and that was that",
]


def make_corpus(seed: int) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Train and test rows, each {"text": ..., "label": ...}, shuffled, the concepts in equal parts."""
    rng = random.Random(seed)
    used_clauses: set[str] = set()
    train, test = [], []
    for concept in MAIN:
        rows = [
            {"text": make_text(rng, concept, used_clauses), "label": concept}
            for _ in range(N_TRAIN_PER_CONCEPT + N_TEST_PER_CONCEPT)
        ]
        train += rows[:N_TRAIN_PER_CONCEPT]
        test += rows[N_TRAIN_PER_CONCEPT:]
    return shuffled(rng, train), shuffled(rng, test)


def make_text(rng: random.Random, concept: str, used_clauses: set[str]) -> str:
    """One text of a permitted length around a main clause that is not in `used_clauses` yet; adds the clause to it."""
    while True:
        clause = make_clause(rng, concept)
        text = finished(rng, wrapped(rng, concept, clause))
        if clause not in used_clauses and len(text.split()) in WORDS:
            used_clauses.add(clause)
            return text


def make_clause(rng: random.Random, concept: str) -> str:
    if rng.random() < VAGUE_SHARE:
        return expand(rng, pick(rng, [template for labels, template in VAGUE if concept in labels]), LEXICON)
    return expand(rng, pick(rng, MAIN[concept]), LEXICON)


def wrapped(rng: random.Random, concept: str, clause: str) -> str:
    """The clause in its surroundings: a mention of another concept, a neutral frame, both or none."""
    text = clause
    if rng.random() < PASSING_MENTION_SHARE:
        other = pick(rng, [name for name in MAIN if name != concept])
        slots = {"passing": IN_PASSING[other], "topic": TOPIC[other], "someone": SOMEONE[other]}
        text = expand(rng, pick(rng, WITH_PASSING_MENTION), LEXICON | slots | {"main": [text]})
    if rng.random() < WRAPPER_SHARE:
        text = expand(rng, pick(rng, WRAPPERS), LEXICON | {"main": [text]})
    return text


def finished(rng: random.Random, text: str) -> str:
    """Articles put right, a capital and a full stop; or, as people also write, neither."""
    text = re.sub(r"\b([Aa]) (?=[aeiou])(?!one\b|uni|use|euro)", r"\1n ", re.sub(r"\s+", " ", text).strip())
    if rng.random() < LOWER_CASE_SHARE:
        return text.lower()
    return text[0].upper() + text[1:] + ("!" if rng.random() < 0.08 else ".")


INNERMOST = re.compile(r"\[([^\[\]{}]*)\]|\{(\w+)\}")


def expand(rng: random.Random, template: str, lexicon: Mapping[str, Sequence[str]]) -> str:
    """The template with every slot and every choice filled, from the left, innermost first."""
    while found := INNERMOST.search(template):
        options = found[1].split("|") if found[1] is not None else lexicon[found[2]]
        template = template[: found.start()] + pick(rng, options) + template[found.end() :]
    return template


def pick(rng: random.Random, options: Sequence[str]) -> str:
    # Python promises the same sequence in every version for random() alone, not for choice() or shuffle().
    return options[int(rng.random() * len(options))]


def shuffled(rng: random.Random, rows: list[dict[str, str]]) -> list[dict[str, str]]:
    return [row for _, row in sorted(((rng.random(), row) for row in rows), key=lambda pair: pair[0])]


def write_corpus(folder: Path, seed: int) -> dict[str, Path]:
    """Writes train.jsonl and test.jsonl into the folder; returns their paths by split."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = {}
    for split, rows in zip(("train", "test"), make_corpus(seed), strict=True):
        paths[split] = folder / f"{split}.jsonl"
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        paths[split].write_bytes(lines.encode())
    return paths


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m jobs.make_demo_corpus", description="Write the demo's corpus.")
    parser.add_argument("--out", type=Path, default=DEMO_CORPUS, help="folder for train.jsonl and test.jsonl")
    parser.add_argument("--seed", type=int, default=0, help="0 gives the corpus that the package ships")
    args = parser.parse_args(argv)
    for split, path in write_corpus(args.out, args.seed).items():
        print(f"{split}: {path}, {path.stat().st_size:,} bytes", file=sys.stderr)


if __name__ == "__main__":
    main()
