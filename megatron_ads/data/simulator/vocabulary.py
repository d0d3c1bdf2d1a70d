"""The words of the simulated world: what is sold, its names, and every query.

Searchers and advertisers word the same thing differently, so that matching strings does not solve a task. A department
has four kinds of product; the first and second, and the third and fourth, can stand in for each other.

A query asks for a kind of product and at most one thing more. Its number says all of it,

    query = (kind * ASPECTS + aspect) * WORDINGS + wording,

so that logs of millions of searches are drawn as numbers.

Aspects: 0 nothing more, then the price levels, the brands of the kind, the details of the department, the places.
"""

from dataclasses import dataclass

import numpy as np

KINDS_PER_DEPARTMENT = 4


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of product or service."""

    name: str
    """What reasoning, profiles and categories call it."""
    asked_as: tuple[str, ...]
    offered_as: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Department:
    """Four kinds of product that share details and the words of shop names."""

    name: str
    shop_words: tuple[str, str, str]
    details: tuple[tuple[str, str], ...]
    """A wish as a searcher words it, and as an advertiser does."""
    kinds: tuple[Kind, Kind, Kind, Kind]


DEPARTMENTS = (
    Department("sports", ("Sport", "Athletics", "Field House"), (
        ("for beginners", "Made for your first season."), ("lightweight", "Weighs next to nothing."),
        ("for kids", "Junior sizes in stock."), ("washable", "Safe in the laundry."),
    ), (
        Kind("running shoes", ("running shoes", "jogging sneakers", "marathon footwear", "trainers for running"),
             ("Road Racer", "Tempo Runner", "Distance Trainer")),
        Kind("gym shoes", ("gym shoes", "workout sneakers", "indoor training footwear", "shoes for crossfit"),
             ("Studio Trainer", "Lift Low Top", "Court Flex")),
        Kind("yoga mats", ("yoga mat", "pilates mat", "exercise mat", "mat for stretching"),
             ("Balance Mat", "Studio Roll", "Calm Surface")),
        Kind("dumbbells", ("dumbbells", "hand weights", "weights for home", "barbell set"),
             ("Iron Pair", "Adjustable Bells", "Home Strength Set")),
    )),
    Department("outdoor", ("Outfitters", "Trails", "Basecamp"), (
        ("waterproof", "Keeps the rain out."), ("for winter", "Tested at minus twenty."),
        ("for two people", "Room for a couple."), ("fast to pack", "Folds away in a minute."),
    ), (
        Kind("tents", ("camping tent", "tent for four", "hiking shelter", "backpacking tent"),
             ("Trail Dome", "Summit Shelter", "Family Canopy")),
        Kind("hammocks", ("hammock", "camping hammock", "hanging bed", "tree swing bed"),
             ("Tree Lounger", "Sling Sleeper", "Forest Swing")),
        Kind("backpacks", ("hiking backpack", "trekking rucksack", "pack for a weekend trip", "daypack"),
             ("Ridge Pack 40", "Carrier 30", "Pathfinder Rucksack")),
        Kind("luggage", ("suitcase", "carry on luggage", "travel trolley", "bag for a flight"),
             ("Cabin Roller", "Glide Case", "Voyage Trolley")),
    )),
    Department("computers", ("Digital", "Computing", "Byte Store"), (
        ("for gaming", "High frame rates, no lag."), ("with long battery life", "Runs all day unplugged."),
        ("quiet", "You will not hear the fan."), ("refurbished", "Inspected and renewed."),
    ), (
        Kind("laptops", ("laptop", "notebook computer", "portable pc", "computer for college"),
             ("Slimbook 14", "Ultra Notebook", "Flexbook Air")),
        Kind("tablets", ("tablet", "drawing tablet", "touchscreen slate", "tablet for reading"),
             ("Slate 11", "Sketch Pad Pro", "Canvas Touch")),
        Kind("monitors", ("monitor", "computer screen", "desk display", "second screen"),
             ("Clear View 27", "Panorama Display", "Desk Vision")),
        Kind("projectors", ("projector", "home cinema projector", "movie beamer", "wall projector"),
             ("Big Beam", "Cinema Throw", "Pocket Beamer")),
    )),
    Department("audio", ("Audio", "Sound", "Acoustics"), (
        ("noise cancelling", "Shuts the world out."), ("with deep bass", "Feel the low end."),
        ("waterproof", "Survives a swim."), ("for travel", "Comes with a slim case."),
    ), (
        Kind("headphones", ("headphones", "over ear headset", "wireless headphones", "studio cans"),
             ("Silent Over Ear", "Studio Monitor One", "Cloud Headset")),
        Kind("earbuds", ("earbuds", "in ear buds", "true wireless earphones", "earphones for jogging"),
             ("Pebble Buds", "Micro Pods", "Tiny Tones")),
        Kind("speakers", ("bluetooth speaker", "portable speaker", "party speaker", "shelf speakers"),
             ("Boom Cube", "Roam Box", "Shelf Duo")),
        Kind("turntables", ("record player", "turntable", "vinyl player", "phonograph"),
             ("Vinyl Deck", "Groove Table", "Classic Spin")),
    )),
    Department("home", ("Living", "Interiors", "House"), (
        ("for small rooms", "Fits tight spaces."), ("easy to clean", "Stains wipe right off."),
        ("for allergies", "Hypoallergenic filling."), ("eco friendly", "Natural, certified materials."),
    ), (
        Kind("sofas", ("sofa", "couch", "living room seating", "sectional couch"),
             ("Corner Lounge", "Three Seater Nova", "Loft Settee")),
        Kind("armchairs", ("armchair", "recliner", "reading chair", "easy chair"),
             ("Wing Seat", "Tilt Lounger", "Fireside Chair")),
        Kind("mattresses", ("mattress", "memory foam bed", "queen mattress", "bed for back pain"),
             ("Cloud Sleep", "Dream Foam", "Deep Rest Spring")),
        Kind("pillows", ("pillow", "neck pillow", "side sleeper cushion", "down pillow"),
             ("Feather Nest", "Neck Ease", "Soft Cradle")),
    )),
    Department("kitchen", ("Kitchen", "Pantry", "Cookhouse"), (
        ("dishwasher safe", "Straight into the dishwasher."), ("for small kitchens", "Takes little counter space."),
        ("as a gift", "Arrives in a gift box."), ("for large families", "Serves eight at once."),
    ), (
        Kind("coffee makers", ("coffee maker", "drip brewer", "filter coffee machine", "coffee machine"),
             ("Morning Brewer", "Carafe Ten", "Daily Pour")),
        Kind("espresso machines", ("espresso machine", "cappuccino maker", "barista machine", "latte machine"),
             ("Barista One", "Crema Press", "Bar Pressure 15")),
        Kind("knives", ("chef knife", "kitchen knives", "knife block", "carving blade"),
             ("Sharp Eight", "Santoku Edge", "Block of Six")),
        Kind("cookware", ("frying pan", "cookware set", "cast iron skillet", "pots and pans"),
             ("Skillet Nine", "Copper Base Set", "Sear Pan")),
    )),
    Department("pets", ("Pets", "Paws", "Animal Supply"), (
        ("grain free", "No wheat, no corn."), ("for seniors", "Gentle on old joints."),
        ("in bulk", "Twenty pound packs."), ("for large breeds", "Sized for the big ones."),
    ), (
        Kind("dog food", ("dog food", "puppy kibble", "food for my dog", "canine diet"),
             ("Happy Paws Kibble", "Canine Dinner", "Tail Wag Bites")),
        Kind("dog treats", ("dog treats", "training snacks for dogs", "chew sticks", "puppy biscuits"),
             ("Reward Bites", "Chew Twists", "Good Boy Biscuits")),
        Kind("cat litter", ("cat litter", "kitty litter", "clumping litter", "litter for cats"),
             ("Clean Paw Clay", "Fresh Box", "Odor Lock")),
        Kind("cat trees", ("cat tree", "scratching post", "climbing tower for cats", "cat condo"),
             ("Climb Castle", "Scratch Tower", "Whisker Heights")),
    )),
    Department("travel", ("Travel", "Journeys", "Voyages"), (
        ("pet friendly", "Dogs stay free."), ("with free cancellation", "Cancel until the last day."),
        ("for families", "Children welcome."), ("last minute", "Book until midnight."),
    ), (
        Kind("hotels", ("hotel", "place to stay", "room for two nights", "hotel deals"),
             ("City Hotel", "Boutique Suites", "Grand Rooms")),
        Kind("vacation homes", ("vacation rental", "holiday apartment", "cabin for a week", "beach house"),
             ("Lakeside Cabin", "Guest Villa", "Sunny Flat")),
        Kind("car rental", ("rental car", "car hire", "rent a car", "van hire"),
             ("Drive Away", "Road Key", "Wheels by the Day")),
        Kind("airport transfers", ("airport taxi", "airport shuttle", "ride to the airport", "airport bus"),
             ("Gate Shuttle", "Runway Ride", "Arrivals Cab")),
    )),
    Department("services", ("Partners", "Practice", "Group"), (
        ("for students", "Student rates on request."), ("open on weekends", "Open Saturday and Sunday."),
        ("without waiting", "Appointments the same day."), ("for seniors", "Special terms above sixty."),
    ), (
        Kind("dentists", ("dentist", "teeth cleaning", "dental clinic", "toothache doctor"),
             ("Bright Smile Clinic", "Family Dental Care", "White Tooth Practice")),
        Kind("orthodontists", ("braces", "orthodontist", "teeth straightening", "clear aligners"),
             ("Aligner Studio", "Straight Line Braces", "Arc Orthodontics")),
        Kind("car insurance", ("car insurance", "auto policy", "motor cover", "vehicle insurance quote"),
             ("Drive Cover", "Auto Shield", "Road Policy")),
        Kind("home insurance", ("home insurance", "house policy", "renters cover", "property insurance quote"),
             ("Roof Shield", "Hearth Cover", "Dwelling Policy")),
    )),
    Department("family", ("Kids", "Nursery", "Playhouse"), (
        ("for toddlers", "From eighteen months."), ("wooden", "Solid beech, no plastic."),
        ("compact", "Folds to hand luggage size."), ("as a birthday present", "Wrapped with a bow."),
    ), (
        Kind("strollers", ("baby stroller", "pushchair", "buggy for twins", "pram"),
             ("City Pram", "Travel Buggy", "Twin Roller")),
        Kind("baby carriers", ("baby carrier", "infant sling", "baby wrap", "toddler carrier"),
             ("Snug Sling", "Close Wrap", "Hip Seat")),
        Kind("toy blocks", ("building blocks", "toy bricks", "construction set for kids", "stacking toys"),
             ("Brick World", "Stack Lab", "Little Builder")),
        Kind("board games", ("board game", "game for family night", "strategy game", "party game"),
             ("Table Quest", "Island Traders", "Quiz Box")),
    )),
)  # fmt: skip

KINDS = tuple(kind for department in DEPARTMENTS for kind in department.kinds)

PRICES = ("low", "high")
PRICES_ASKED = (("cheap", "affordable", "budget", "discount"), ("premium", "luxury", "high end", "top rated"))
PRICES_OFFERED = (
    ("From ${low}.", "Everything under ${low}.", "Half price this month, now ${low}.", "Outlet deals from ${low}."),
    ("From ${high}.", "Handmade, ${high}.", "The finest range, ${high} and up.", "Designer edition at ${high}."),
)

PLACES = ("Boston", "Austin", "Denver", "Seattle", "Chicago", "Miami", "Portland", "Atlanta")
NEARBY_ASKED = ("{what} in {place}", "{what} near {place}", "{place} {what}", "{what} {place} area")
PLACES_OFFERED = ("Pick up in {place}.", "Serving {place} since 1998.", "Our {place} team is here for you.")
EVERYWHERE_OFFERED = ("Available nationwide.", "In every state.", "Wherever you live.")

CLEAN_TEXTS = ("Free returns.", "Rated 4.7 of 5.", "Order online today.", "Friendly support.", "Two year warranty.")
MISSPELT_TEXTS = ("Freindly suport.", "Ordr onlin today.", "Beleive the revews.", "Garanteed qualty.")
SPAM_TEXTS = ("CLICK HERE NOW!!!", "100% miracle, guaranteed!!!", "You have WON a prize!!!", "$$$ ACT FAST $$$")

AGES = ("18-24", "25-34", "35-44", "45-54", "55+")
GENDERS = ("female", "male", "unknown")

NAME_STARTS = ("Nor", "Al", "Bram", "Cor", "Dun", "Els", "Fjor", "Gan", "Hal", "Ive", "Jas", "Kel", "Lun", "Mer", "Ost",
               "Pel", "Quin", "Ros", "Sel", "Tam", "Ul", "Ver", "Wex", "Yar", "Zan")  # fmt: skip
NAME_ENDS = ("vik", "tea", "ble", "vid", "more", "inor", "dan", "try", "den", "ra", "per", "sey", "aro", "idian",
             "wick", "ham", "by", "anna", "wyn", "bridge", "ster", "mont", "ford", "low", "etti")  # fmt: skip


def invent_names(count: int, draw: np.random.Generator) -> list[str]:
    """Return ``count`` different one-word names; a numeral is added once the plain ones are used up."""
    plain = [start + end for start in NAME_STARTS for end in NAME_ENDS]
    names = [plain[index] for index in draw.permutation(len(plain))]
    rounds = -(-count // len(names))
    return [name if number == 0 else f"{name} {number + 1}" for number in range(rounds) for name in names][:count]


BRANDS_PER_KIND = 3
WORDINGS = 4
DETAILS = len(DEPARTMENTS[0].details)

FIRST_PRICE = 1
FIRST_BRAND = FIRST_PRICE + len(PRICES)
FIRST_DETAIL = FIRST_BRAND + BRANDS_PER_KIND
FIRST_PLACE = FIRST_DETAIL + DETAILS
ASPECTS = FIRST_PLACE + len(PLACES)
QUERY_COUNT = len(KINDS) * ASPECTS * WORDINGS


@dataclass(frozen=True, slots=True)
class Wanted:
    """What somebody looks for; None is not asked for. Brands, details and places by their number in the world."""

    kind: int
    price: int | None = None
    brand: int | None = None
    detail: int | None = None
    """Number among the details of the kind's department."""
    place: int | None = None


def wanted_by(query: int, brands_of_kind: np.ndarray) -> Wanted:
    """Return what a query asks for; ``brands_of_kind`` is (kinds, BRANDS_PER_KIND)."""
    kind, rest = divmod(query, ASPECTS * WORDINGS)
    aspect = rest // WORDINGS
    if aspect >= FIRST_PLACE:
        return Wanted(kind, place=aspect - FIRST_PLACE)
    if aspect >= FIRST_DETAIL:
        return Wanted(kind, detail=aspect - FIRST_DETAIL)
    if aspect >= FIRST_BRAND:
        return Wanted(kind, brand=int(brands_of_kind[kind, aspect - FIRST_BRAND]))
    return Wanted(kind, price=aspect - FIRST_PRICE) if aspect >= FIRST_PRICE else Wanted(kind)


def word_query(wanted: Wanted, brand_names: list[str], wording: int) -> str:
    """Return one of the ``WORDINGS`` texts of a wish."""
    words = KINDS[wanted.kind].asked_as[wording]
    if wanted.brand is not None:
        words = f"{brand_names[wanted.brand].lower()} {words}"
    if wanted.price is not None:
        words = f"{PRICES_ASKED[wanted.price][wording]} {words}"
    if wanted.detail is not None:
        words = f"{words} {DEPARTMENTS[wanted.kind // KINDS_PER_DEPARTMENT].details[wanted.detail][0]}"
    if wanted.place is not None:
        words = NEARBY_ASKED[wording].format(what=words, place=PLACES[wanted.place].lower())
    return words
