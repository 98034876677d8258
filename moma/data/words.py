"""Word lists for cleaning captions (`moma.data.captions`) and choosing classes (`moma.data.openimages`).

Lower case. Plurals are listed if they count as attributes too ("a cat with stripes").
"""


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Colours. Foods that are sometimes colours (chocolate, cherry, lemon, cream ...) are left out: before a noun
# they usually name an ingredient ("chocolate cake", "ice cream"). SUFFIXES catches "cream colored".
COLOURS = _words(
    """red orange yellow green blue purple violet pink brown black white gray grey beige tan gold golden
    silver silvery bronze copper turquoise teal cyan magenta maroon crimson scarlet burgundy navy indigo
    lavender lilac mauve fuchsia aqua khaki ivory ebony amber auburn blond blonde brunette ginger
    reddish orangish yellowish greenish bluish purplish pinkish brownish blackish whitish grayish
    greyish colorful colourful colored coloured multicolored multicoloured multicolor rainbow monochrome
    pastel neon"""
)
# Shapes of whole things. "ring", "star", "heart" and "circle" usually are things, not shapes of things.
SHAPES = _words(
    """round rounded square rectangular circular oval triangular spherical cylindrical conical cubic cubical
    hexagonal octagonal pentagonal elliptical pointed pointy curved spiral shaped"""
)
# Textures: patterns, surfaces and materials.
TEXTURES = _words(
    """striped stripes spotted spots dot dotted dots plaid checkered chequered patterned floral paisley argyle
    camo camouflage tabby calico brindle tortoiseshell speckled mottled marbled textured tinted furry
    fuzzy fluffy hairy shaggy woolly smooth shiny glossy matte sparkly glittery glittering metallic
    translucent transparent polished rusty rusted wrinkled bumpy scaly curly woven knitted knit
    crocheted quilted embroidered wooden wood glass metal leather plastic stone brick paper marble
    granite denim velvet silk satin cotton wool woolen linen suede ceramic porcelain steel iron aluminum
    aluminium brass chrome tin concrete straw wicker rattan bamboo rubber clay terracotta cardboard lace"""
)
ATTRIBUTES = COLOURS | SHAPES | TEXTURES
# They turn the word before them into an attribute: "cream colored dog", "heart shaped box".
SUFFIXES = _words("shaped colored coloured patterned textured tinted toned hued")
# Removed together with the attribute they precede: "light blue", "very shiny", "polka dot".
MODIFIERS = _words(
    """light lightly dark darkly bright brightly pale deep deeply vivid very mostly partly all solid multi off
    polka semi half hot royal sky navy lime forest baby brick blood rose"""
)
# Attributes that are things if no noun follows: "an orange on a table", "a glass of water".
NOUNS = _words(
    """orange rose violet lavender square spiral tabby calico ginger glass stone brick paper iron straw marble
    lace tin knit gold silver bronze plaid wood rainbow"""
)
# Names in which such a word is not an attribute; a class label in the caption is always kept.
FIXED_NAMES = (
    "red panda", "brown bear", "black bear", "golden retriever", "blue jay", "blue whale", "red wine",
    "white wine", "orange juice", "orange tree", "green tea", "green beans", "green onions", "black pepper",
    "wine glass", "wine glasses", "glass of", "piece of paper", "toilet paper", "paper towel", "golden gate",
    "times square", "town square",
)  # fmt: skip

ARTICLES = _words("a an the")
COUNTS = _words("one two three four five several some many")
DETERMINERS = ARTICLES | _words("his her its their my your our this that these those")
JOINERS = _words("and or & , / -")
PREPOSITIONS = _words(
    "in of from with on at by to for near under over into onto like as through out above below behind beside"
)
COPULAS = _words("is are was were be being been looks appears seems turned")
# Words that follow nouns: an attribute before one of them has no noun of its own.
AFTER_NOUN = (
    PREPOSITIONS | COPULAS | DETERMINERS | COUNTS | JOINERS | _words(
        """but while which who where when next between among against across along around inside outside down
        up has have sitting sits standing stands lying laying lies laid resting rests hanging hangs leaning
        floating growing placed filled full sliced cut peeled surrounded covered parked running walking flying
        eating looking holding wearing playing sleeping swimming jumping"""
    )
)  # fmt: skip
# Words left hanging before a removed attribute: "is [red]", "made of [wood]", "dressed in [black]".
HANGING = (
    PREPOSITIONS | COPULAS | DETERMINERS | COUNTS | JOINERS | _words(
        """which made built carved painted dyed dressed clad wrapped decorated printed wearing featuring all
        both mostly ones either partly entirely"""
    )
)  # fmt: skip
# Of these, words that make an attribute describe what precedes them, even if it could be a thing.
PREDICATIVE = COPULAS | _words("in of from made built carved painted dyed dressed")
# Other adjectives: "a big, red car" loses its comma too, "a dog and white cat" keeps its "and".
ADJECTIVES = _words(
    """big small little large huge tiny tall short long old young new modern vintage antique cute beautiful
    nice fat thin soft wet dry clean dirty empty happy fancy simple"""
)
# Beginnings whose spelling does not tell "a" from "an".
VOWEL_EXCEPTIONS = ("uni", "use", "usu", "ute", "eu", "one", "once", "ukulele")  # take "a"
SILENT_H = ("hour", "honest", "honor", "honour", "heir")  # take "an"

# Other words that captions use for a class; the first one found is replaced by the class's name.
SYNONYMS = {
    "airplane": ("aeroplane", "plane", "jet", "aircraft"),
    "aircraft": ("airplane", "plane", "jet"),
    "bicycle": ("bike",),
    "boat": ("ship", "sailboat", "yacht"),
    "bookcase": ("bookshelf",),
    "car": ("automobile", "sedan", "vehicle"),
    "cat": ("kitten", "kitty"),
    "cattle": ("cow", "bull", "calf"),
    "couch": ("sofa",),
    "dog": ("puppy", "pup"),
    "doughnut": ("donut",),
    "goose": ("geese",),
    "hamburger": ("burger", "cheeseburger"),
    "houseplant": ("plant",),
    "mobile phone": ("cellphone", "smartphone", "phone", "iphone"),
    "motorcycle": ("motorbike", "bike", "scooter"),
    "rabbit": ("bunny",),
    "refrigerator": ("fridge",),
    "sculpture": ("statue",),
    "studio couch": ("sofa",),
    "sofa bed": ("sofa", "couch"),
    "telephone": ("phone",),
    "television": ("tv",),
    "waste container": ("trash can", "garbage can", "bin"),
    "watercraft": ("boat", "ship"),
}
# Labels whose last word alone is another thing: a "dog" is not a hot dog.
WHOLE_LABELS = frozenset(
    {"hot dog", "sea lion", "bell pepper", "computer mouse", "drinking straw", "ice cream"}
)
# Endings of singular class names that look like plurals.
SINGULAR_S = ("ss", "us", "lens", "canvas", "christmas")

# People and their parts. The paper trains on other subjects: the identity of a person lies in the face and
# needs other data, and a mask of a hand or of hair shows no subject at all.
HUMAN_CLASSES = frozenset(
    {
        "person", "man", "woman", "boy", "girl", "human body", "human head", "human face", "human hair",
        "human eye", "human ear", "human nose", "human mouth", "human beard", "human arm", "human hand",
        "human leg", "human foot",
    }
)  # fmt: skip
# Garments: nearly always worn in these photos, so that their masks are cut-outs of a person. Things that
# often appear on their own (boots, hats, glasses, bags, watches) are kept.
WORN_CLASSES = frozenset(
    {
        "clothing", "footwear", "dress", "shirt", "jeans", "trousers", "shorts", "skirt", "miniskirt",
        "jacket", "coat", "suit", "swimwear", "brassiere", "sports uniform", "sock", "glove", "scarf", "tie",
        "belt", "diaper", "lifejacket", "swim cap", "seat belt", "necklace", "earrings", "fashion accessory",
    }
)  # fmt: skip
