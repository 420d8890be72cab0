"""The tools of the built-in generator: everyday life here, work in `catalogue_work`. Data, one entry a tool.

In a request, `[...]` is a clause for an optional parameter: said and passed, or neither. `{flag=true}` in a clause
passes true without being said. A request that starts with a small letter is an imperative.
"""
# ruff: noqa: E501 (tables)

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Tool:
    """One tool with the ways to ask for it. Slot lines are read by `slots.parse_slots`."""

    domain: str
    verbs: str  # `a|b`; the tool's name is a verb and a noun
    nouns: str
    about: str  # its description, `a|b`
    slots: str
    asks: tuple[str, ...]
    vague: str  # an imperative that leaves required parameters out
    result: str  # a slot line
    replies: tuple[str, ...]  # may use required parameters and the result


def tool(line: str, about: str, slots: str, *asks: str, vague: str, result: str, replies: tuple[str, ...]) -> Tool:
    """Build a tool from `domain: verbs / nouns` and the rest."""
    domain, _, name = line.partition(": ")
    verbs, _, nouns = name.partition(" / ")
    return Tool(domain, verbs, nouns, about, slots, asks, vague, result, replies)


LIFE = (
    tool("weather: get|fetch|check / weather|forecast|conditions", "Weather forecast for a city|Get the forecast",
         "city|location|place=city; days|num_days=int:2:9?; units|unit=one:celsius:fahrenheit?",
         "check the weather in {city}[ for the next {days} days][, in {units}]",
         "What's the weather like in {city}[ over the next {days} days]?", "Will I need a coat in {city}[, in {units}]?",
         vague="check the weather", result="temperature=int:-4:34; sky=one:sunny:cloudy:rainy:windy:foggy",
         replies=("It is {temperature} degrees and {sky} in {city}.", "{city}: {sky}, {temperature} degrees.")),
    tool("weather: get|lookup|read / air_quality|pollen_level|aqi", "Air quality of a city|Current AQI for a place",
         "city|location|town=city; date|day=date?",
         "look up the air quality in {city}[ on {date}]", "How clean is the air in {city}[ on {date}]?",
         vague="look up the air quality", result="index=int:12:190",
         replies=("The air quality index in {city} is {index}.", "{city} has an index of {index}.")),
    tool("calendar: create|add|schedule / event|meeting|appointment", "Create a calendar event|Put an event on the calendar",
         "title|summary|name=meeting; date|day=date; time|start_time=time; guests|attendees=list:person?",
         "schedule a {title} on {date} at {time}[ with {guests}]", "put a {title} on my calendar for {date}, {time}[, and invite {guests}]",
         "I have a {title} on {date} at {time}[ with {guests}]. Can it go on my calendar?",
         vague="schedule a {title}", result="event_id=code; status=one:confirmed:tentative",
         replies=("Your {title} on {date} at {time} is {status}.", "Done: {title}, {date} at {time} ({event_id}).")),
    tool("calendar: list|show|get / events|agenda|day", "List the events of a day|Show what is on a date",
         "date|day=date; owner|person=person?", "show me the events on {date}[ in the calendar of {owner}]",
         "What is planned for {date}[ in the calendar of {owner}]?", vague="show me what is on the calendar",
         result="events=list:meeting", replies=("On {date} there is {events}.", "The agenda for {date}: {events}.")),
    tool("reminders: set|add|create / reminder|alert|todo", "Set a reminder|Remind the user of something",
         "task|text|what=note; date|due=date; urgent|important=flag?",
         "remind me to {task} on {date}[ and mark it as urgent{urgent=true}]", "set a reminder for {date} to {task}",
         "I must not forget to {task} on {date}. Can you make a note?", vague="set a reminder to {task}",
         result="reminder_id=code", replies=("I will remind you to {task} on {date}.", "Reminder {reminder_id} is set for {date}.")),
    tool("messages: send|post|write / message|text|sms", "Send a text message|Text someone",
         "recipient|to|contact=person; text|body|content=body",
         "text {recipient} that {text}", "send {recipient} a message saying {text}", "Can {recipient} be told that {text}?",
         vague="send {recipient} a message", result="status=one:sent:queued:delivered",
         replies=("Your message to {recipient} is {status}.", "The text to {recipient} was {status}.")),
    tool("contacts: find|search|get / contact|person|phone_number", "Find a contact|Look a person up in the address book",
         "name|person|query=person; team|group=team?", "find the contact details of {name}[ from the {team} team]",
         "What's the number of {name}[ in the {team} team]?", vague="find someone's contact details",
         result="phone=phone; email=email", replies=("{name} can be reached at {phone} or {email}.", "I found {name}: {phone}, {email}.")),
    tool("maps: get|find|plan / route|directions|way", "Directions between two places|Route from one city to another",
         "origin|from|start=city; destination|to|end=city; mode|travel_mode=one:driving:walking:cycling:transit?; avoid_tolls=flag?",
         "find the way from {origin} to {destination}[ by {mode}]", "plan a route from {origin} to {destination}[ without tolls{avoid_tolls=true}]",
         "How do I get from {origin} to {destination}[ by {mode}]?", vague="plan a route to {destination}",
         result="distance_km=int:8:940; minutes=int:10:600",
         replies=("{origin} to {destination} is {distance_km} km and takes {minutes} minutes.", "It takes {minutes} minutes for the {distance_km} km.")),
    tool("maps: find|search|locate / places|nearby|poi", "Find places of a kind near an address|Search nearby places",
         "kind|category|type=one:pharmacy:bakery:gym:bank:cafe:park; address|near|around=address; radius|radius_m=int:200:5000?",
         "find a {kind} near {address}[ within {radius} metres]", "Is there a {kind} close to {address}[, at most {radius} metres away]?",
         vague="find a {kind} nearby", result="street=street",
         replies=("There is a {kind} at {street}.", "The nearest {kind} is at {street}.")),
    tool("home: set|adjust|change / thermostat|temperature|heating", "Set the temperature of a room|Control the heating",
         "room|zone|area=room; temperature|degrees|target=num:16:25; until|end_time=time?",
         "set the {room} to {temperature} degrees[ until {until}]", "Can the {room} be at {temperature} degrees[ until {until}]?",
         vague="change the heating in the {room}", result="current=num:14:24",
         replies=("The {room} is set to {temperature} degrees; it is {current} now.", "Done. It is {current} degrees in the {room} at the moment.")),
    tool("home: switch|control|set / lights|lamp|lighting", "Switch the lights of a room|Control lamps",
         "room|area|zone=room; state|action|power=one:on:off; until|end_time=time?; fade|fade_seconds=int:2:30?",
         "turn the lights in the {room} {state}[ until {until}]", "switch {state} the {room} lights[ over {fade} seconds]",
         vague="change the lights in the {room}", result="state_id=code",
         replies=("The {room} lights are {state}.", "I switched the lights in the {room} {state}.")),
    tool("music: play|start|queue / song|track|music", "Play a song|Start playing a track",
         "song|title|track=song; artist|by=artist?; volume|level=int:10:90?",
         "play {song}[ by {artist}]", "put on {song}[ at volume {volume}]", "Can I hear {song}[ by {artist}]?",
         vague="play a song", result="device=room; seconds=int:120:420", replies=("Playing {song} in the {device}.", "{song} is on now.")),
    tool("music: create|make|build / playlist|mix|station", "Create a playlist|Make a mix of a genre",
         "genre|style=genre; tracks|count|length=int:5:40; explicit|allow_explicit=flag?",
         "make a playlist of {genre} with {tracks} tracks[, explicit lyrics are fine{explicit=true}][, nothing explicit{explicit=false}]",
         "I'd love {tracks} tracks of {genre}[, clean lyrics only{explicit=false}].", vague="make a playlist of {genre}",
         result="playlist_id=code", replies=("Your {genre} playlist with {tracks} tracks is ready.", "Saved as {playlist_id}: {tracks} tracks of {genre}.")),
    tool("travel: search|find|list / flights|flight|airfare", "Search flights|Find flights between cities",
         "origin|from|departure_city=city; destination|to|arrival_city=city; date|departure_date=date; direct|nonstop=flag?",
         "find flights from {origin} to {destination} on {date}[, direct only{direct=true}]",
         "What flies from {origin} to {destination} on {date}[ without a stop{direct=true}]?", vague="find flights to {destination}",
         result="airline=airline; price=int:60:900; departs=time",
         replies=("The best offer from {origin} to {destination} is {airline} at {departs} for {price} EUR.", "{airline} leaves at {departs} and costs {price} EUR.")),
    tool("travel: book|reserve|request / hotel|room|stay", "Book a hotel room|Reserve a room for a period",
         "city|location|destination=city; period|stay|dates=period; guests|people=int:2:6; breakfast=flag?",
         "book a hotel in {city} for {guests} from {period}[ with breakfast{breakfast=true}][, no breakfast{breakfast=false}]",
         "I need a room in {city}, {period}, for {guests}[ with breakfast{breakfast=true}].", vague="book a hotel in {city}",
         result="hotel=restaurant; total=int:90:1400",
         replies=("I booked {hotel} in {city} for {total} EUR.", "You have a room at {hotel}; the total is {total} EUR.")),
    tool("dining: book|reserve|get / table|restaurant|dinner", "Reserve a table|Book a restaurant table",
         "restaurant|venue|place=restaurant; guests|party_size|people=int:2:9; date|day=date; time|at=time",
         "book a table for {guests} at {restaurant} on {date} at {time}", "Is there a table for {guests} at {restaurant} on {date}, {time}?",
         vague="book a table at {restaurant}", result="confirmation=code",
         replies=("Your table for {guests} at {restaurant} is booked, code {confirmation}.", "{restaurant} expects you on {date} at {time}.")),
    tool("shopping: search|find|browse / products|catalog|items", "Search the shop|Find products by name and price",
         "query|keywords|item=product; max_price|budget=price:10:200?; in_stock|available=flag?",
         'search the shop for "{query}"[ at {max_price} or less][, in stock only{in_stock=true}]',
         'Do you sell "{query}"[ for at most {max_price}]?', vague="search the shop",
         result="price=price:8:180; stock=int:1:60; sku=code", replies=('"{query}" costs {price}; {stock} left.', 'I found "{query}" ({sku}) for {price}.')),
    tool("shopping: add|put|place / to_cart|cart_item|basket", "Add an item to the cart|Put a product in the basket",
         "item|product=product; quantity|count|qty=int:1:9; gift|gift_wrap=flag?",
         "add {quantity} of the item {item} to my cart[, gift wrapped{gift=true}]", "put {quantity} x {item} in the basket[ as a gift{gift=true}]",
         vague="add something to my cart", result="total=price:10:400", replies=("{quantity} x {item} added; the cart is at {total}.", "Done, the total is {total}.")),
    tool("groceries: add|update|put / grocery_list|shopping_list|list_items", "Add items to the grocery list|Update the shopping list",
         "items|products|entries=list:grocery; store|shop=one:market:corner_shop:organic_store?",
         "put {items} on the grocery list[ for the {store}]", "We are out of {items}. Can they go on the list[ for the {store}]?",
         vague="put something on the grocery list", result="count=int:3:20", replies=("I added {items}; the list has {count} items.", "{items} are on the list.")),
    tool("translation: translate|convert|render / text|sentence|phrase", "Translate a text|Translate to another language",
         "text|sentence|input=sentence; target|target_language|to=language; formal|polite=flag?",
         'translate "{text}" into {target}[ in a formal tone{formal=true}]', 'How do you say "{text}" in {target}[, informally{formal=false}]?',
         vague='translate "{text}"', result="saved_as=file", replies=("The {target} translation is in {saved_as}.", "Translated and saved as {saved_as}.")),
    tool("health: log|record|track / workout|exercise|activity", "Log a workout|Record an exercise",
         "activity|exercise|sport=exercise; minutes|duration=int:10:120; date|day=date?; intensity|effort=one:easy:moderate:hard?",
         "log {minutes} minutes of {activity}[ on {date}]", "I did {minutes} minutes of {activity}[, it felt {intensity}].",
         vague="log my {activity}", result="calories=int:60:900", replies=("{minutes} minutes of {activity} logged, about {calories} kcal.", "Saved. You burned {calories} kcal.")),
    tool("health: get|lookup|find / calories|nutrition|food_info", "Nutrition of a food|Calories in a food",
         "food|item|query=food; grams|amount|weight=int:50:400?", "look up the calories in {food}[ for {grams} grams]",
         "How many calories are there in {food}[, say {grams} grams]?", vague="look up some calories",
         result="calories=int:30:700; protein=int:1:40", replies=("{food} has {calories} kcal and {protein} g of protein.", "That is {calories} kcal.")),
    tool("sports: get|check|fetch / score|result|match", "Score of a team's last match|Get a match result",
         "team|club|name=team_name; date|on=date?", "check the score of {team}[ on {date}]", "How did {team} do[ on {date}]?",
         vague="check a score", result="scored=int:0:6; conceded=int:0:6",
         replies=("For {team} it ended {scored} to {conceded}.", "{team} scored {scored} and conceded {conceded}.")),
    tool("films: get|find|lookup / movie|film|showtimes", "Details and showtimes of a film|Find where a film is shown",
         "title|film|movie=film; city|location=city; after|earliest=time?",
         "find showtimes for {title} in {city}[ after {after}]", "Where can I watch {title} in {city}[ after {after}]?",
         vague="find showtimes for {title}", result="cinema=restaurant; starts=time",
         replies=("{title} starts at {starts} at {cinema}.", "{cinema} in {city} shows {title} at {starts}.")),
)  # fmt: skip

HELD_OUT = (  # only conversations of the test split use these
    tool("garden: plan|set|schedule / watering|irrigation|plant_care", "Plan the watering of a plant|Schedule plant care",
         "plant|species=plant; interval|every_days=int:2:9; amount_ml|water=int:50:900?",
         "water the {plant} every {interval} days[ with {amount_ml} ml]", "My {plant} needs water every {interval} days[, {amount_ml} ml each time]. Can you arrange it?",
         vague="arrange the watering of my {plant}", result="next=date", replies=("The {plant} gets water next on {next}.", "Set up: every {interval} days, next on {next}.")),
    tool("garden: identify|diagnose|examine / plant|disease|leaf", "Diagnose a plant from its symptom|Identify a plant problem",
         "plant|species=plant; symptom|sign=one:yellow_leaves:spots:wilting:mould",
         "find out what {symptom} on a {plant} means", "Why does my {plant} show {symptom}?", vague="find out what is wrong with my {plant}",
         result="cause=one:overwatering:too_little_light:pests:cold", replies=("The likely cause for the {plant} is {cause}.", "It looks like {cause}.")),
    tool("astronomy: get|compute|find / rise_time|visibility|planet_position", "When a planet is visible|Position of a planet in the sky",
         "planet|body|object=planet; city|observer|location=city; date|night=date?",
         "find out when {planet} rises in {city}[ on {date}]", "When can I see {planet} from {city}[ on {date}]?", vague="find out when {planet} rises",
         result="rises=time; magnitude=num:0:6", replies=("{planet} rises at {rises} in {city}.", "Look out for it at {rises}; its magnitude is {magnitude}.")),
    tool("library: search|find|locate / book|title|catalogue", "Search the library for a book|Is a book on the shelf",
         "title|book=book; author|by=author?; branch|site=city?", "search the library for {title}[ by {author}][ at the {branch} branch]",
         "Does the library have {title}[ by {author}]?", vague="search the library", result="copies=int:2:5; shelf=code",
         replies=("The library has {copies} copies of {title} on shelf {shelf}.", "{title}: {copies} copies, shelf {shelf}.")),
    tool("library: renew|extend|prolong / loan|book_loan|borrowing", "Renew a loan|Extend a borrowed book",
         "title|book=book; weeks|extension=int:2:4", "renew my loan of {title} for {weeks} weeks", "Can I keep {title} for {weeks} more weeks?",
         vague="renew my loan of {title}", result="due=date", replies=("{title} is now due on {due}.", "Renewed for {weeks} weeks, until {due}.")),
    tool("parking: find|reserve|book / parking_spot|parking|garage", "Reserve a parking spot|Find parking near an address",
         "address|near|location=address; hours|duration=int:2:12; electric|charger=flag?",
         "reserve parking near {address} for {hours} hours[ with a charger{electric=true}]", "Where can I park near {address} for {hours} hours[, with a charger{electric=true}]?",
         vague="reserve parking", result="spot=code; fee=price:2:30", replies=("Spot {spot} is yours for {hours} hours, {fee} EUR.", "Reserved: {spot}, for {fee} EUR.")),
    tool("pets: book|make|schedule / vet_visit|vet|checkup", "Book a visit to the vet|Schedule a pet checkup",
         "pet|name|animal=pet; date|day=date; reason|why=one:vaccination:checkup:dental:injury",
         "book the vet for {pet} on {date}, reason: {reason}", "{pet} has to see the vet ({reason}). Is there time on {date}?",
         vague="book a visit to the vet for {pet}", result="time=time", replies=("{pet} is expected at {time} on {date}.", "Booked for {date} at {time}.")),
    tool("museum: buy|order|get / tickets|admission|entry", "Buy museum tickets|Tickets for a museum on a date",
         "museum|venue=museum; date|day=date; adults|count=int:2:6; guide|audio_guide=flag?",
         "buy {adults} tickets for {museum} on {date}[ with an audio guide{guide=true}]", "Can we visit {museum} on {date}? We are {adults}[ and want the audio guide{guide=true}].",
         vague="buy tickets for {museum}", result="order=code; total=price:12:120", replies=("Order {order}: {adults} tickets for {museum}, {total} EUR.", "You can visit {museum} on {date}; the total is {total}.")),
)  # fmt: skip
