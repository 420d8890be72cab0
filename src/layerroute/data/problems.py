"""Questions to be answered by thinking, not by a tool: worked arithmetic (`#### n` at the end), plans, deductions."""

from collections.abc import Callable
from itertools import pairwise
from random import Random

from layerroute.data.phrases import POOLS
from layerroute.data.slots import MONTHS, join

Problem = tuple[str, str]  # question, answer
WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")


def arithmetic(random: Random) -> Problem:
    """Return a word problem of two to four operations and its worked solution, which ends in `#### n`."""
    question, lines, result = random.choice(ARITHMETIC)(random)
    return question, "\n".join([*lines, f"#### {result}"])


def reasoning(random: Random) -> Problem:
    """Return a question that needs a plan, a comparison or a deduction, and its answer with the reasons."""
    return random.choice(REASONING)(random)


Worked = tuple[str, list[str], int]  # question, lines of the solution, result


def _shopping(random: Random) -> Worked:
    name, (first, second) = _name(random), random.sample(POOLS["product"], 2)
    n, m, p, q = (random.randint(2, 9) for _ in range(4))
    p, q = p * random.randint(1, 6), q * random.randint(1, 6)
    total = n * p + m * q
    paid = (total // 50 + 1) * 50
    question = (
        f"{name} orders {n} of the item {first} at ${p} each and {m} of the item {second} at ${q} each. "
        f"{random.choice(('How much change is left from', 'How much remains of'))} ${paid}?"
    )
    lines = [
        f"The first item costs {n} * {p} = ${n * p} in all.",
        f"The second costs {m} * {q} = ${m * q}.",
        f"Together that is {n * p} + {m * q} = ${total}.",
        f"{paid} - {total} = ${paid - total} is left.",
    ]
    return question, lines, paid - total


def _wages(random: Random) -> Worked:
    name, hours, days, rate = _name(random), random.randint(3, 9), random.randint(2, 6), random.randint(9, 32)
    bonus = random.randint(2, 12) * 5
    earned = hours * days * rate
    question = (
        f"{name} works {hours} hours a day on {days} days of the week and earns ${rate} an hour. "
        f"This week there is also a bonus of ${bonus}. "
        f"{random.choice(('What is the pay', 'How much money is that'))} for the week?"
    )
    lines = [
        f"{name} works {hours} * {days} = {hours * days} hours.",
        f"That earns {hours * days} * {rate} = ${earned}.",
        f"With the bonus it is {earned} + {bonus} = ${earned + bonus}.",
    ]
    return question, lines, earned + bonus


def _share(random: Random) -> Worked:
    name, people, each = _name(random), random.randint(3, 9), random.randint(3, 15)
    kept, thing = (
        random.randint(2, 12),
        random.choice(("stickers", "marbles", "cards", "apples", "coins", "shells", "stamps")),
    )
    boxes = random.randint(2, 6)
    total = people * each + kept
    while total % boxes:
        kept, total = kept + 1, total + 1
    question = (
        f"{name} has {boxes} boxes with {total // boxes} {thing} in each. After keeping {kept}, {name} shares the rest "
        f"equally among {people} friends. How many {thing} does each friend get?"
    )
    lines = [
        f"There are {boxes} * {total // boxes} = {total} {thing}.",
        f"After keeping {kept}, {total} - {kept} = {total - kept} are left.",
        f"Each friend gets {total - kept} / {people} = {each} {thing}.",
    ]
    return question, lines, each


def _journey(random: Random) -> Worked:
    start, end = random.sample(POOLS["city"], 2)
    fast, slow, a, b = random.randint(7, 12) * 10, random.randint(3, 6) * 10, random.randint(2, 6), random.randint(1, 4)
    total = fast * a + slow * b
    question = (
        f"On the way from {start} to {end} a bus drives {a} hours at {fast} km/h and then {b} hours at {slow} km/h. "
        f"How many kilometres does it drive?"
    )
    lines = [f"First part: {fast} * {a} = {fast * a} km.", f"Second part: {slow} * {b} = {slow * b} km."]
    return question, [*lines, f"In all: {fast * a} + {slow * b} = {total} km."], total


def _discount(random: Random) -> Worked:
    name, product = _name(random), random.choice(POOLS["product"])
    price, percent, count = random.randint(2, 40) * 20, random.choice((5, 10, 15, 20, 25, 30, 40)), random.randint(2, 5)
    off = price * percent // 100
    question = (
        f"A {product} costs ${price}. Today there is a discount of {percent}%. "
        f"How much does {name} pay for {count} of them?"
    )
    lines = [
        f"The discount is {price} * {percent} / 100 = ${off}.",
        f"One costs {price} - {off} = ${price - off}.",
        f"{count} cost {price - off} * {count} = ${(price - off) * count}.",
    ]
    return question, lines, (price - off) * count


def _ages(random: Random) -> Worked:
    a, b, c = random.sample(POOLS["person"], 3)
    age, more, times, later = random.randint(4, 14), random.randint(2, 9), random.randint(2, 4), random.randint(2, 12)
    second, third = age + more, (age + more) * times
    question = (
        f"{a} is {age} years old. {b} is {more} years older than {a}, and {c} is {times} times as old as {b}. "
        f"How old will {c} be in {later} years?"
    )
    lines = [
        f"{b} is {age} + {more} = {second}.",
        f"{c} is {second} * {times} = {third}.",
        f"In {later} years {c} will be {third} + {later} = {third + later}.",
    ]
    return question, lines, third + later


def _stock(random: Random) -> Worked:
    item, start = random.choice(POOLS["grocery"]), random.randint(80, 400)
    sold, days, came = random.randint(3, 12), random.randint(3, 6), random.randint(20, 90)
    left = start - sold * days + came
    question = (
        f"A shop has {start} packs of {item}. It sells {sold} packs a day for {days} days, "
        f"then {came} new packs arrive. How many packs does it have now?"
    )
    lines = [
        f"It sells {sold} * {days} = {sold * days} packs.",
        f"That leaves {start} - {sold * days} = {start - sold * days}.",
        f"With the delivery there are {start - sold * days} + {came} = {left}.",
    ]
    return question, lines, left


def _garden(random: Random) -> Worked:
    name, long, wide = _name(random), random.randint(6, 30), random.randint(3, 15)
    price = random.randint(2, 14)
    around = 2 * (long + wide)
    question = (
        f"{name} builds a fence around a garden that is {long} metres long and {wide} metres wide. "
        f"A metre of fence costs ${price}. What does the fence cost?"
    )
    lines = [
        f"Length and width make {long} + {wide} = {long + wide} metres.",
        f"All around it is 2 * {long + wide} = {around} metres.",
        f"The fence costs {around} * {price} = ${around * price}.",
    ]
    return question, lines, around * price


def _saving(random: Random) -> Worked:
    name, product = _name(random), random.choice(POOLS["product"])
    week, spent, weeks, had = (
        random.randint(12, 40),
        random.randint(2, 10),
        random.randint(4, 12),
        random.randint(5, 60),
    )
    total = had + (week - spent) * weeks
    question = (
        f"{name} has ${had} and wants a new {product}. Each week {name} gets ${week} and spends ${spent} of it. "
        f"How much money is there after {weeks} weeks?"
    )
    lines = [
        f"Each week {week} - {spent} = ${week - spent} stays.",
        f"In {weeks} weeks that is {week - spent} * {weeks} = ${(week - spent) * weeks}.",
        f"With the first ${had} it is {had} + {(week - spent) * weeks} = ${total}.",
    ]
    return question, lines, total


def _reading(random: Random) -> Worked:
    name, book = _name(random), random.choice(POOLS["book"])
    day, done, days = random.randint(8, 35), random.randint(2, 9), random.randint(3, 14)
    pages = day * (done + days)
    question = (
        f"{book} has {pages} pages in {name}'s edition. {name} reads {day} pages a day and has read for {done} days. "
        f"How many more days are needed?"
    )
    lines = [
        f"So far {name} has read {day} * {done} = {day * done} pages.",
        f"{pages} - {day * done} = {pages - day * done} pages are left.",
        f"That takes {pages - day * done} / {day} = {days} days.",
    ]
    return question, lines, days


ARITHMETIC: tuple[Callable[[Random], Worked], ...] = (
    _shopping, _wages, _share, _journey, _discount, _ages, _stock, _garden, _saving, _reading,
)  # fmt: skip


def _order(random: Random) -> Problem:
    tasks = random.sample(POOLS["note"], 4)
    first, second, third, fourth = tasks
    rules = [f"I can only {second} after I {first}", f"I {third} once I have managed to {second}", f"I {fourth} last"]
    shown = random.sample(tasks, 4)
    question = f"I have to {join(shown)}. {_listed(rules, random)} In which order should I do it?"
    steps = "\n".join(f"{number}. {task.capitalize()}" for number, task in enumerate(tasks, start=1))
    reason = f"You need to {first} before you {second}, that comes before you {third}, and you {fourth} at the end."
    return question, f"Plan:\n{steps}\n\n{reason}"


def _ranking(random: Random) -> Problem:
    names = random.sample(POOLS["person"], 4)
    word, most = random.choice((("taller", "tallest"), ("older", "oldest"), ("faster", "fastest")))
    facts = [f"{a} is {word} than {b}" for a, b in pairwise(names)]
    question = f"{_listed(facts, random)} Who is the {most}, and who comes third?"
    chain = " > ".join(names)
    return question, f"Putting the facts in one line: {chain}. So {names[0]} is the {most} and {names[2]} comes third."


def _weekday(random: Random) -> Problem:
    start, days, meeting = random.randrange(7), random.randint(9, 60), random.choice(POOLS["meeting"])
    end, rest = (start + days) % 7, days % 7
    question = f"Today is {WEEKDAYS[start]} and my {meeting} is in {days} days. Which day of the week is that?"
    return question, (
        f"{days} days are {days // 7} full weeks and {rest} days. Full weeks do not change the day. "
        f"{WEEKDAYS[start]} plus {rest} days is {WEEKDAYS[end]}.\n\nAnswer: {WEEKDAYS[end]}."
    )


def _offers(random: Random) -> Problem:
    (a, b), product = random.sample(POOLS["host"], 2), random.choice(POOLS["product"])
    small, large = random.randint(2, 5), random.randint(6, 12)
    unit_a, unit_b = random.sample(range(3, 25), 2)
    better, low, high = (a, unit_a, unit_b) if unit_a < unit_b else (b, unit_b, unit_a)
    question = (
        f"{a} sells {small} of the item {product} for ${small * unit_a}, {b} sells {large} for ${large * unit_b}. "
        f"Which offer is better for one piece?"
    )
    return question, (
        f"At {a} one costs {small * unit_a} / {small} = ${unit_a}. "
        f"At {b} one costs {large * unit_b} / {large} = ${unit_b}. "
        f"${low} is less than ${high}, so {better} is the better offer."
    )


def _meeting(random: Random) -> Problem:
    a, b = random.sample(POOLS["person"], 2)
    hours = list(range(9, 17))
    free = random.choice(hours)
    rest = [hour for hour in hours if hour != free]
    busy_a = sorted(random.sample(rest, 4))
    busy_b = sorted({*random.sample(busy_a, 2), *(hour for hour in rest if hour not in busy_a)})
    question = (
        f"{a} is busy at {join([f'{h}:00' for h in busy_a])}. {b} is busy at {join([f'{h}:00' for h in busy_b])}. "
        f"When can they meet for an hour between 9:00 and 17:00?"
    )
    open_a = [f"{hour}:00" for hour in hours if hour not in busy_a]
    return (
        question,
        f"{a} is free at {join(open_a)}. Of these, {b} is busy at all but {free}:00. They can meet at {free}:00.",
    )


def _budget(random: Random) -> Problem:
    city, nights, night = random.choice(POOLS["city"]), random.randint(2, 6), random.randint(40, 130)
    food, fare = random.randint(15, 45), random.randint(60, 300)
    total = nights * (night + food) + fare
    budget = max(50, total + random.choice((-1, 1)) * random.randint(10, 120))
    verdict = "it fits" if total <= budget else "it does not fit"
    gap = abs(budget - total)
    question = (
        f"I want to go to {city} for {nights} nights. A night costs ${night}, food is ${food} a day for {nights} days "
        f"and the fare is ${fare}. Does that fit into ${budget}?"
    )
    return question, (
        f"Reasoning:\n1. Rooms: {nights} * {night} = ${nights * night}.\n"
        f"2. Food: {nights} * {food} = ${nights * food}.\n"
        f"3. With the fare: {nights * night} + {nights * food} + {fare} = ${total}.\n\n"
        f"${total} against ${budget}: {verdict}, with ${gap} {'left' if total <= budget else 'missing'}."
    )


def _duration(random: Random) -> Problem:
    meeting, hour, minute = (
        random.choice(POOLS["meeting"]),
        random.randint(8, 18),
        random.choice((5, 15, 20, 35, 40, 50)),
    )
    minutes = random.choice((45, 50, 70, 75, 85, 95, 110, 130))
    end = hour * 60 + minute + minutes
    question = f"My {meeting} starts at {hour}:{minute:02d} and takes {minutes} minutes. When is it over?"
    return question, (
        f"{minutes} minutes are {minutes // 60} h {minutes % 60} min. {hour}:{minute:02d} plus {minutes // 60} h is "
        f"{hour + minutes // 60}:{minute:02d}, plus {minutes % 60} min is {end // 60}:{end % 60:02d}. "
        f"It is over at {end // 60}:{end % 60:02d}."
    )


def _project(random: Random) -> Problem:
    topic, team, days = random.choice(POOLS["topic"]), random.choice(POOLS["team"]), random.randint(5, 20)
    shares = random.choice(((2, 2, 1), (1, 3, 1), (3, 1, 1), (2, 1, 2)))
    ends = [(2 * days * sum(shares[:count]) // sum(shares) + 1) // 2 for count in range(len(shares) + 1)]  # rounded
    parts = [end - start for start, end in pairwise(ends)]
    names = random.choice(
        (("research", "writing", "review"), ("interviews", "analysis", "slides"), ("reading", "draft", "edits"))
    )
    question = (
        f"The {team} team wants a report on {topic} within {days} working days. "
        f"Plan {join(list(names))} in the ratio {':'.join(map(str, shares))}, whole days only."
    )
    begun, lines = 1, []
    for name, part in zip(names, parts, strict=True):
        lines.append(
            f"- {name.capitalize()}: {part} day{'s' if part > 1 else ''}, from day {begun} to day {begun + part - 1}"
        )
        begun += part
    lines.append(f"\nThat uses all {days} days, each part rounded to whole ones.")
    return question, "\n".join(["Here is a plan:", *lines])


def _calendar(random: Random) -> Problem:
    month = random.randrange(11)
    name, days = MONTHS[month]
    following = MONTHS[month + 1][0]
    day, end, note = random.randint(2, days), random.randint(1, 28), random.choice(POOLS["note"])
    later = days - day + end
    question = f"It is {name} {day} in a year that is no leap year. I must {note} in {later} days. Which date is that?"
    left = days - day
    return question, (
        f"{name} has {days} days, so {left} days are left in it. "
        f"{later} - {left} = {end} days remain for {following}. The date is {following} {end}."
    )


REASONING: tuple[Callable[[Random], Problem], ...] = (
    _order, _ranking, _weekday, _offers, _meeting, _budget, _duration, _project, _calendar,
)  # fmt: skip


def _name(random: Random) -> str:
    return random.choice(POOLS["person"])


def _listed(facts: list[str], random: Random) -> str:
    return " ".join(f"{fact}." for fact in random.sample(facts, len(facts)))
