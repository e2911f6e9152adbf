"""The vocabulary of `reviews.py`: what is reviewed, its aspects, and adjectives of either sentiment."""

from dataclasses import dataclass

# Adjectives that take "very" (mild) and those that do not (strong); both fit every noun and aspect of every domain.
MILD = {
    True: ("good", "impressive", "admirable", "appealing", "satisfying", "pleasing", "memorable", "commendable", "refreshing"),
    False: ("bad", "disappointing", "dull", "poor", "irritating", "mediocre", "forgettable", "annoying", "dreary", "tiresome"),
}
STRONG = {
    True: ("wonderful", "superb", "brilliant", "excellent", "marvellous", "splendid", "fantastic", "delightful"),
    False: ("awful", "dreadful", "terrible", "atrocious", "appalling", "dismal", "horrible", "abysmal"),
}


@dataclass(frozen=True)
class Domain:
    """A kind of thing that people review.

    nouns: what it is called. aspects: noun phrases and whether they are plural. good, bad: mild adjectives that fit its
    nouns. met: participle of experiencing it, after "I have never". previous: an earlier one of its kind.
    notes: neutral sentences.
    """

    nouns: tuple[str, ...]
    aspects: tuple[tuple[str, bool], ...]
    good: tuple[str, ...]
    bad: tuple[str, ...]
    met: str
    previous: str
    notes: tuple[str, ...]

    @property
    def mild(self) -> dict[bool, tuple[str, ...]]:
        """The adjectives of this domain alone, by sentiment."""
        return {True: self.good, False: self.bad}


DOMAINS = (
    Domain(
        nouns=("film", "comedy", "thriller", "documentary"),
        aspects=(("the acting", False), ("the plot", False), ("the music", False), ("the dialogue", False), ("the costumes", True)),
        good=("gripping", "moving", "clever", "witty"),
        bad=("boring", "predictable", "clumsy", "silly"),
        met="seen", previous="the director's last work",
        notes=("I saw it on a Tuesday.", "It runs for two hours.", "It has subtitles."),
    ),
    Domain(
        nouns=("novel", "book", "memoir", "biography"),
        aspects=(("the prose", False), ("the ending", False), ("the opening chapter", False), ("the characters", True)),
        good=("absorbing", "moving", "clever", "elegant"),
        bad=("boring", "pretentious", "clumsy", "confusing"),
        met="read", previous="the author's first work",
        notes=("I read it on the train.", "It has twelve chapters.", "My cousin lent me her copy."),
    ),
    Domain(
        nouns=("restaurant", "bistro", "cafe", "pizzeria"),
        aspects=(("the food", False), ("the service", False), ("the wine list", False), ("the desserts", True), ("the lighting", False)),
        good=("inviting", "agreeable", "stylish", "civilised"),
        bad=("overpriced", "gloomy", "pretentious", "unappealing"),
        met="been to", previous="the place next door",
        notes=("We sat by the window.", "It opens at six.", "There were four of us."),
    ),
    Domain(
        nouns=("hotel", "guest house", "inn", "hostel"),
        aspects=(("the breakfast", False), ("the room", False), ("the view", False), ("the beds", True), ("the staff", True)),
        good=("relaxing", "agreeable", "inviting", "stylish"),
        bad=("depressing", "gloomy", "unpleasant", "shabby"),
        met="stayed at", previous="the place we had tried before",
        notes=("We stayed for three nights.", "It is near the station.", "It has forty rooms."),
    ),
    Domain(
        nouns=("phone", "laptop", "camera", "tablet"),
        aspects=(("the screen", False), ("the battery", False), ("the software", False), ("the speakers", True), ("the keyboard", False)),
        good=("reliable", "handy", "elegant", "responsive"),
        bad=("unreliable", "flimsy", "clumsy", "sluggish"),
        met="owned", previous="the old model",
        notes=("I bought it in March.", "It came in a grey box.", "I use it for work."),
    ),
    Domain(
        nouns=("play", "musical", "opera", "production"),
        aspects=(("the singing", False), ("the staging", False), ("the orchestra", False), ("the costumes", True)),
        good=("moving", "gripping", "witty", "inventive"),
        bad=("boring", "lifeless", "pretentious", "clumsy"),
        met="seen", previous="the company's last effort",
        notes=("We sat in the third row.", "It has one interval.", "It starts at eight."),
    ),
    Domain(
        nouns=("museum", "exhibition", "gallery", "show"),
        aspects=(("the lighting", False), ("the guide", False), ("the shop", False), ("the paintings", True), ("the layout", False)),
        good=("fascinating", "inspiring", "inventive", "stimulating"),
        bad=("boring", "lifeless", "confusing", "stuffy"),
        met="been to", previous="the one across the river",
        notes=("We went on a Sunday.", "It closes at five.", "Tickets are sold online."),
    ),
    Domain(
        nouns=("course", "lecture", "workshop", "seminar"),
        aspects=(("the teacher", False), ("the handout", False), ("the slides", True), ("the exercises", True)),
        good=("inspiring", "stimulating", "clear", "fascinating"),
        bad=("boring", "confusing", "muddled", "pretentious"),
        met="attended", previous="the one I took last year",
        notes=("I took it in May.", "There were twenty of us.", "It is held in the old library."),
    ),
    Domain(
        nouns=("album", "record", "concert", "symphony"),
        aspects=(("the singing", False), ("the opening piece", False), ("the lyrics", True), ("the sound", False), ("the drums", True)),
        good=("moving", "catchy", "inventive", "elegant"),
        bad=("boring", "lifeless", "predictable", "clumsy"),
        met="heard", previous="the band's last effort",
        notes=("I heard it at a friend's house.", "It lasts an hour.", "It was recorded in Oslo."),
    ),
)  # fmt: skip
