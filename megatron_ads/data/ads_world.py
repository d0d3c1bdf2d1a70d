"""The words of the built-in query-ad pairs: categories, brands, price levels, places, and flaws of an ad's text.

Queries and ads word the same thing differently, so that matching strings does not solve the task.
"""

from dataclasses import dataclass
from enum import StrEnum


@dataclass(frozen=True, slots=True)
class Category:
    """One kind of product or service."""

    name: str
    """One word: what reasoning calls it."""
    asked_as: tuple[str, ...]
    """How a searcher words it."""
    offered_as: tuple[str, ...]
    """How an advertiser words it."""


class Price(StrEnum):
    """What a searcher wants to spend, and what an ad charges."""

    cheap = "cheap"
    premium = "premium"


class Text(StrEnum):
    """Quality of an ad's text."""

    clean = "clean"
    misspelt = "misspelt"
    spam = "spam"


CATEGORIES = (
    Category("shoes", ("running shoes", "jogging sneakers", "shoes for a marathon"), ("Road Runner", "Race Trainers")),
    Category("laptops", ("laptop", "notebook computer", "portable pc"), ("Ultrabook 14", "Slim Laptop")),
    Category("hotels", ("hotel", "place to stay", "room for two nights"), ("City Hotel", "Boutique Suites")),
    Category("coffee", ("coffee maker", "espresso machine", "drip brewer"), ("Barista One", "Morning Brewer")),
    Category("sofas", ("sofa", "couch", "living room seating"), ("Corner Sofa", "Sleeper Couch")),
    Category("headphones", ("headphones", "earbuds", "wireless headset"), ("Studio Earphones", "Quiet Headset")),
    Category("insurance", ("car insurance", "auto policy", "motor cover"), ("Drive Cover", "Auto Insurance")),
    Category("mats", ("yoga mat", "pilates mat", "exercise mat"), ("Balance Mat", "Studio Mat")),
    Category("kibble", ("dog food", "puppy kibble", "food for my dog"), ("Happy Paws Kibble", "Canine Dinner")),
    Category("phones", ("smartphone", "mobile phone", "android handset"), ("Pocket Phone", "Photo Smartphone")),
    Category("tents", ("camping tent", "tent for four", "hiking shelter"), ("Trail Tent", "Dome Shelter")),
    Category("pizza", ("pizza delivery", "order a pizza", "pizza tonight"), ("Stone Oven Pizza", "Pizza Box")),
    Category("dentists", ("dentist", "teeth cleaning", "dental clinic"), ("Bright Smile Clinic", "Family Dental")),
    Category("watches", ("wrist watch", "chronograph", "watch for a gift"), ("Classic Timepiece", "Steel Chrono")),
    Category("tools", ("garden tools", "hedge trimmer", "spade and rake"), ("Green Thumb Kit", "Hedge Cutter")),
    Category("strollers", ("baby stroller", "pushchair", "buggy for twins"), ("City Pram", "Travel Buggy")),
)
BRANDS = ("Norvik", "Altea", "Bramble", "Corvid", "Dunmore", "Elsinor", "Fjord", "Gantry")
PLACES = ("Boston", "Austin", "Denver", "Seattle", "Chicago", "Miami", "Dublin", "Leeds")
PRICES_ASKED = {Price.cheap: ("cheap", "affordable", "budget"), Price.premium: ("luxury", "premium", "high end")}
PRICES_OFFERED = {
    Price.cheap: ("Low prices all week.", "Everything under $25.", "Half price this month."),
    Price.premium: ("Handmade, from $900.", "First class in every detail.", "Exclusive designer range."),
}
PLACES_OFFERED = ("Pick up in {place}.", "Serving {place} since 1998.", "Our {place} team is here for you.")
TEXTS = {
    Text.clean: ("Free returns.", "Rated 4.7 of 5.", "Order online today.", "Friendly support."),
    Text.misspelt: ("Freindly suport.", "Ordr onlin today.", "Beleive the revews."),
    Text.spam: ("CLICK HERE NOW!!!", "100% miracle, guaranteed!!!", "You have WON a prize!!!"),
}
