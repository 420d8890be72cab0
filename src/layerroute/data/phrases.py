"""The phrase tables of the built-in generator: names, values and ways of saying things. Data only.

In `POOLS` an entry `value~text~text` is passed to a tool as `value` and said as one of the texts.
In request frames `{x}` is an imperative ("check the weather"), `{X}` the same with a capital letter.
"""
# ruff: noqa: E501 (tables)

# fmt: off
NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")

POOLS: dict[str, tuple[str, ...]] = {
    "person": ("Ana", "Ben", "Chloe", "Dev", "Elif", "Farah", "Goran", "Hana", "Ivo", "Jamal", "Kirsten", "Liam", "Mina",
               "Noor", "Otto", "Priya", "Quinn", "Rosa", "Sven", "Tomas", "Uma", "Viktor", "Wen", "Yara", "Zoe", "Marcus"),
    "family": ("Adler", "Bauer", "Costa", "Diaz", "Evans", "Fischer", "Garcia", "Haddad", "Ito", "Jensen", "Khan", "Lopez",
               "Moreau", "Novak", "Okafor", "Patel", "Rossi", "Silva", "Tanaka", "Weber"),
    "city": ("Lisbon", "Oslo", "Kyoto", "Nairobi", "Denver", "Lima", "Hanoi", "Porto", "Bergen", "Tunis", "Quito", "Perth",
             "Krakow", "Leeds", "Austin", "Seville", "Izmir", "Accra", "Osaka", "Turin", "Ghent", "Cusco", "Mumbai",
             "Boston", "Zurich", "Dakar", "Hobart", "Riga", "Split", "Tampa"),
    "street": ("12 Mill Lane", "48 Harbour Road", "7 Elm Street", "301 Station Road", "19 Rose Avenue", "86 Castle Hill",
               "5 Bakery Row", "220 North Street", "33 Orchard Way", "64 Bridge Street", "91 Canal Walk", "15 Abbey Close"),
    "host": ("example.com", "mail.test", "northwind.test", "acme.test", "bluefin.test", "oakridge.test", "lumen.test"),
    "slug": ("pricing", "docs/setup", "blog/launch", "jobs", "status", "about", "news/week-12", "help/login", "press"),
    "currency": ("EUR~euros~EUR", "USD~US dollars~USD", "GBP~pounds~GBP", "JPY~yen~JPY", "CHF~Swiss francs~CHF",
                 "SEK~Swedish kronor~SEK", "CAD~Canadian dollars~CAD", "INR~rupees~INR", "PLN~zloty~PLN"),
    "language": ("fr~French", "de~German", "es~Spanish", "it~Italian", "pt~Portuguese", "ja~Japanese", "tr~Turkish",
                 "nl~Dutch", "pl~Polish", "sv~Swedish", "vi~Vietnamese", "ko~Korean"),
    "sentence": ("The station is around the corner", "The meeting is moved to Monday", "I would like two tickets", "Thank you for your help",
                 "The train is late again", "Please close the door", "My bag was stolen", "We will arrive after dinner",
                 "This costs too much", "The soup is too salty", "I lost my key", "See you next week"),
    "note": ("buy printer paper", "call the landlord", "renew the passport", "water the ferns", "send the invoice",
             "pick up the parcel", "book the dentist", "back up the laptop", "return the library card", "pay the rent",
             "order more coffee", "clean the filters", "check the tyres", "sign the lease"),
    "subject": ("Budget review", "Lunch on Friday", "Server outage", "New floor plan", "Invoice 2214", "Team offsite",
                "Contract draft", "Welcome aboard", "Travel receipts", "Roadmap for spring", "Parking permit"),
    "body": ("the draft is ready for a look", "we start half an hour later", "the signed copy is needed today",
             "the figures are in the shared folder", "the room has changed to 4B", "the bus is ten minutes late",
             "the order shipped this morning", "it was kind to step in yesterday", "the demo went well"),
    "meeting": ("standup", "budget review", "design crit", "dentist visit", "yoga class", "one-on-one", "school play",
                "retro", "board call", "piano lesson", "planning session", "team lunch", "job interview", "book club"),
    "file": ("report.pdf", "notes.txt", "todo.txt", "main.py", "data.json", "photo_12.png", "draft.md", "data.csv",
             "invoice_88.pdf", "README.md", "server.log", "app.log", "settings.json", "setup.py", "people.csv", "map.png"),
    "folder": ("/home/mia/docs", "/var/log", "/tmp/export", "/srv/www", "/home/lu/atlas", "/data/raw", "/home/kim/in",
               "/opt/app/bin", "/mnt/archive", "/photos/2024", "/etc/nginx"),
    "extension": (".py", ".md", ".log", ".csv", ".png", ".json", ".txt", ".pdf"),
    "command": ("df -h", "git status", "ls -la /srv", "uptime", "docker ps", "free -m", "npm run build", "make test",
                "systemctl status nginx", "tail -n 50 app.log", "whoami", "du -sh ."),
    "table": ("orders", "customers", "invoices", "employees", "shipments", "products", "sessions", "refunds", "payments"),
    "column": ("status", "country", "created_at", "amount", "owner", "priority", "region", "updated_at"),
    "product": ("wireless mouse", "desk lamp", "rain jacket", "coffee grinder", "yoga mat", "backpack", "water bottle",
                "phone case", "office chair", "hiking boots", "bike light", "travel pillow", "USB hub", "kettle", "tent"),
    "grocery": ("oat milk", "eggs", "brown rice", "olive oil", "tomatoes", "bananas", "yoghurt", "lentils", "bread",
                "spinach", "cheddar", "coffee beans", "garlic", "honey", "salmon"),
    "artist": ("Nina Simone", "Radiohead", "Fela Kuti", "Bjork", "Miles Davis", "Cesaria Evora", "Daft Punk", "Sade",
               "Kraftwerk", "Joni Mitchell", "Massive Attack", "Tinariwen"),
    "song": ("Feeling Good", "So What", "Army of Me", "Zombie", "Teardrop", "Blue Train", "Hyperballad", "Aerodynamic",
             "Smooth Operator", "River", "Karma Police", "Autobahn"),
    "genre": ("jazz", "ambient", "folk", "techno", "classical", "soul", "reggae", "indie rock", "bossa nova", "blues"),
    "film": ("Stalker", "Amelie", "Alien", "Ran", "Casablanca", "Parasite", "Arrival", "Vertigo", "Persona", "Heat", "Up"),
    "room": ("kitchen", "bedroom", "living room", "hallway", "office", "garage", "bathroom", "attic", "nursery"),
    "restaurant": ("Casa Verde", "Blue Anchor", "Trattoria Lupo", "Sakura", "The Copper Pot", "Saffron House", "Le Petit Zinc",
                   "Golden Wok", "Fig & Olive", "The Old Mill"),
    "ticker": ("ACME", "NVX", "ORBT", "TSLA", "AAPL", "MSFT", "SHEL", "NESN", "SONY", "VOLV", "BMW", "SAP"),
    "topic": ("solar panels", "sleep and memory", "electric buses", "coral reefs", "remote work", "urban farming",
              "the Silk Road", "battery recycling", "honey bees", "tidal power", "the Ming dynasty", "glaciers"),
    "issue": ("the login page is blank", "exports time out", "the search box loses focus", "emails arrive twice",
              "the total is off by one cent", "the app crashes on start", "avatars do not load", "the VPN drops every hour",
              "the printer is offline", "dark mode is unreadable"),
    "team": ("platform", "billing", "mobile", "design", "support", "security", "data", "growth", "infra"),
    "repo": ("atlas", "heron", "paperclip", "tideline", "quokka", "lantern", "basalt", "juniper"),
    "branch": ("main", "develop", "release-2.1", "fix-login", "feature-search", "hotfix-tax", "docs-refresh"),
    "service": ("checkout", "auth", "search", "mailer", "gateway", "thumbnailer", "ledger", "scheduler"),
    "food": ("oatmeal", "a banana", "grilled chicken", "lentil soup", "a bagel", "sushi", "a green salad", "peanut butter"),
    "exercise": ("running", "swimming", "cycling", "rowing", "yoga", "hiking", "boxing", "climbing"),
    "dish": ("risotto", "shakshuka", "ramen", "paella", "dal", "moussaka", "pancakes", "pho", "ratatouille", "tacos"),
    "ingredient": ("chickpeas", "aubergine", "rice", "tofu", "mushrooms", "leeks", "pumpkin", "feta", "kale", "beans"),
    "plant": ("basil", "monstera", "fern", "orchid", "rosemary", "cactus", "peace lily", "tomato plant", "fig tree"),
    "planet": ("Mars", "Venus", "Jupiter", "Saturn", "Mercury", "Neptune", "Uranus"),
    "book": ("Middlemarch", "Dune", "Beloved", "The Trial", "Ulysses", "Emma", "Kindred", "Solaris", "Ficciones", "Persuasion"),
    "author": ("George Eliot", "Toni Morrison", "Franz Kafka", "Jane Austen", "Octavia Butler", "Stanislaw Lem", "Jorge Borges"),
    "museum": ("the Rijksmuseum", "the Prado", "the Uffizi", "the Tate Modern", "the Louvre", "the Met", "the Hermitage"),
    "course": ("linear algebra", "statistics 101", "organic chemistry", "world history", "microeconomics", "data structures"),
    "pet": ("Biscuit", "Luna", "Mochi", "Rex", "Pepper", "Olive", "Ziggy", "Clover"),
    "team_name": ("Ajax", "the Lakers", "Celtic", "the Bruins", "Benfica", "the Yankees", "Sparta", "the Raptors"),
    "word": ("serendipity", "ephemeral", "gregarious", "obfuscate", "laconic", "ubiquitous", "candid", "zealous", "arcane"),
    "color": ("warm white", "red", "teal", "amber", "violet", "green", "blue"),
    "airline": ("Norsky", "AirLuso", "BlueJet", "Andes Air", "Polar Wings", "Meridian"),
}

TYPE_NOTES = {
    "date": "Date, YYYY-MM-DD", "time": "Time, HH:MM", "currency": "ISO 4217 code", "language": "ISO 639-1 code",
    "email": "Email address", "url": "Full URL",
}

SYSTEMS = (
    "You are a helpful assistant.", "You are a concise assistant.", "You are an agent that can call functions.",
    "Answer the user. Use a tool when one fits.", "You help with everyday tasks.", "Be brief and accurate.",
    "You are a careful assistant. Ask when something is missing.", "You are an operations assistant.",
)

ASKING = (  # around an imperative
    "{X}.", "{X}, please.", "Please {x}.", "Could you {x}?", "Can you {x} for me?", "Would you {x}?", "I need you to {x}.",
    "I'd like you to {x}.", "Hi, please {x}.", "Hey, can you {x}?", "Go ahead and {x}.", "Next task: {x}.", "{X} when you can.",
    "Hello! Could you please {x}?", "It would help if you could {x}.", "Time to {x}.", "I want to {x}.", "Help me {x}.",
)
QUESTIONING = ("{X}", "{X}", "Hi! {X}", "Quick question: {X}", "Hello! {X}", "Hmm. {X}", "One thing: {X}", "{X} Thanks!")
BEFORE = (  # a sentence of context that asks for nothing
    "I'm a bit short on time.", "I'm on my phone, so keep it simple.", "My colleague asked me about this.",
    "We talked about this yesterday and I forgot to do it.", "I'm getting ready for a busy week.", "Sorry for the late message.",
    "I'm helping a friend with something.", "My notes are a mess today.", "I'm working from the train.", "Long day here.",
    "This is for a small project of mine.", "I've been meaning to do this for days.", "My laptop is being slow again.",
    "I tried to find this on my own and gave up.", "The family is waiting for an answer.", "Let's get one thing off my list.",
)
AFTER = ("No rush.", "Thanks in advance.", "That's all for now.", "I'll wait.", "Thank you!", "Keep it short.", "Nothing else.")
BOTH = ("{a} and {b}", "{a}, and also {b}", "{a} and then {b}", "{a}, after that {b}", "{a}; {b} as well")
AGAIN = ("And with {noun} {text}?", "Same again, but with {noun} {text}.", "Now for {noun} {text}, please.",
         "What about {noun} {text}?", "Repeat that with {noun} {text}.", "Could you also do it for {noun} {text}?")
ASK_BACK = ("I need the {missing} for that. Can you tell me?", "I can do that. Could you give me the {missing}?", "Happy to help. I still need the {missing}.",
            "Of course. Which {missing} should I use?", "Before I start, please tell me the {missing}.",
            "I'm missing the {missing}.", "To do this I need to know the {missing}.")
GIVE = ("The {noun} is {text}", "{noun}: {text}", "Use {text} as the {noun}", "For the {noun}, {text}", "Take {text} for the {noun}")
THANKS = ("Thanks!", "Great, thank you.", "Perfect, that's what I needed.", "Thank you, that helps a lot.", "Cheers!", "Wonderful.",
          "Got it, thanks {person}.", "Much appreciated.", "Ok, good to know.", "Nice, thanks for the quick answer.")
WELCOME = ("You're welcome! Let me know if there is anything else.", "Glad I could help.", "Any time. Have a good day!",
           "Happy to help. Anything else on your list?", "My pleasure.", "No problem at all. I'm here if you need more.")
NO_TOOL = ("I'm sorry, I can't {x}: none of my tools does that. I can help with {can}, though.",
           "That is outside what I can do. With the tools I have, I can help with {can}.",
           "I don't have a tool to {x}. What I can help with is {can}.",
           "Unfortunately I have no way to {x}. My tools are for {can}.")
FAILED = ("The {tool} call failed: {error}. Shall I try again, or would you like to change something?",
          "I couldn't finish this because of an error ({error}). You could try again in a few minutes.",
          "Something went wrong on the other side: {error}. Nothing was changed. Do you want me to retry?")
ERRORS = ("service unavailable", "rate limit reached", "request timed out", "permission denied", "not found", "internal error")
RETRY = ("Yes, try again.", "Please retry.", "Try once more.", "Go on, one more time.", "Yes please, again.")
LEAD_IN = ("I'll look that up.", "Let me check.", "One moment.", "Sure, doing that now.", "Calling the tool for you.", "On it.")

CHITCHAT = (  # (a remark, answers to it); names in braces are entries of POOLS
    ("Hi there, I'm {person}. How are you today?", ("Hello {person}! I'm doing well, thanks. What can I do for you?", "Hi {person}, all good here. How can I help?")),
    ("My name is {person} and I just moved to {city}.", ("Welcome to {city}, {person}! I hope you settle in well. Anything I can help with?", "Nice to meet you, {person}. I hope {city} treats you well.")),
    ("I finally finished my thesis on {topic}!", ("Congratulations! Finishing a thesis on {topic} is a big achievement. Enjoy the moment.", "That's wonderful news. A thesis on {topic} is a lot of work, and you have earned a rest.")),
    ("I had a rough day in {city}, the {meeting} went badly.", ("I'm sorry to hear that. One bad {meeting} doesn't define you. Do you want to talk it through?", "That sounds tiring. Take a break first; we can think about what to do next together.")),
    ("Do you like {genre}?", ("I don't listen to music as you do, but many people enjoy {genre} for its mood. Do you?", "I can't hear it, though I can talk about {genre} all day. What do you like about it?")),
    ("Can you tell me a joke? My friend {person} is sad.", ("Here is one for {person}: why did the scarecrow win a prize? He was outstanding in his field.", "Tell {person} this: I would tell a joke about paper, but it's tearable.")),
    ("What can you do for me, in general? I'm in {city} this week.", ("I can answer questions and use the tools I have been given. Tell me what you need in {city} and I'll see if one fits.", "Ask me anything; if one of my tools fits I will use it, otherwise I answer from what I know.")),
    ("I think {city} is nicer than people say.", ("That's a matter of taste, but {city} certainly has its charms. What do you like most?", "Many people would agree with you about {city}. What makes it special for you?")),
    ("Wish me luck, {person} and I have a {meeting} soon.", ("Good luck to you both! Stay calm and take your time.", "Fingers crossed for the {meeting}. You and {person} will do fine.")),
    ("Are you a real person? {person} says you are.", ("I'm an AI assistant, so {person} is mistaken, but I'm glad to help.", "No, I'm a program. Please tell {person} I'm flattered.")),
    ("I just cooked {dish} for {person} and it was great.", ("That sounds delicious. It is hard to get {dish} right, well done!", "Lovely! I hope {person} asked for seconds.")),
    ("Just your opinion: is {topic} worth reading about?", ("Yes, I think so: {topic} touches on history, science and daily life, so there is something for everyone.", "It is if you are curious. Start with a short overview of {topic} and see if it holds you.")),
)
# fmt: on
