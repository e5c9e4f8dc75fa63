"""Short names for the contents of the project's own databases."""

from __future__ import annotations

PEOPLE = tuple(
    """Ada Ali Amy Ana Ben Bob Carl Cora Dan Dora Ed Ella Emil Eva Finn Fred Gina Gus Hana Hugo Ida Ines Ivan Jack Jane Jin
    Joe Jon Kai Kate Kim Lea Leo Lily Liz Lou Luke Mai Max Mia Nia Nick Nora Olga Omar Oscar Pam Paul Pia Ravi Rita Rosa
    Sam Sara Sven Tara Tim Tom Uma Vera Will Yara Zoe
    """.split()
)
CITIES = tuple("Paris Rome Oslo Lima Cairo Delhi Tokyo Berlin Madrid Boston Dublin Sydney".split())
COUNTRIES = tuple("France Italy Norway Peru Egypt India Japan Germany Spain China Brazil Kenya".split())
COLORS = tuple("red blue green black white".split())
CONCERTS = tuple(
    """Aurora Blaze Breeze Cloud Comet Coral Dawn Delta Dream Dusk Echo Ember Fever Flame Flow Frost Glow Gold Halo Haze Heart
    Home Honey Hope Ice Jade Joy Light Lunar Magic Mist Moon Neon Night Nova Ocean Opal Orbit Pearl Pulse
    """.split()
)
STORES = tuple(
    """Alto Basil Bravo Cargo Cedar Dixie Fable Gala Harbor Iris Juno Kiwi Lotus Maple Nimbus Olive Pine Quest Rover Sage Tulip
    """.split()
)
PRODUCTS = tuple(
    """apple bag ball bell bike book boot bowl box bread brush cake chair clock coat cup desk doll drum fan fork glass glove
    hat jar kite knife lamp lock map mug nail oven pan pen phone plate ring rope rug
    """.split()
)
TEAMS = tuple(
    """Bears Bulls Colts Crows Ducks Eagles Foxes Hawks Jets Kings Lions Magic Owls Rams Rays Reds Sharks Stars Suns Wolves
    """.split()
)
STUDIOS = tuple(
    """Apex Argo Atlas Bolt Crest Cube Epic Fox Gem Helix Ion Lark Metro Nest Onyx Peak Prism Raven Titan Vista
    """.split()
)
FILMS = tuple(
    """Alibi Arena Ashes Bandit Bridge Canyon Castle Circus Crown Desert Empire Escape Exile Forest Garden Ghost Hunter Island
    Jungle Knight Legend Mirror Mystery Palace Pirate Planet Prince Rebel River Robot Saint Secret Shadow Silence Spy Storm
    Summer Temple Tower Winter
    """.split()
)
BOOKS = tuple(
    """Anchor Arrow Basket Beacon Button Candle Compass Copper Cotton Dagger Feather Fiddle Lantern Ladder Letter Marble Meadow
    Needle Orchard Paper Pebble Pepper Pillow Pocket Puzzle Ribbon Saddle Silver Spider Spoon Stone Sugar Thunder Ticket
    Timber Tunnel Velvet Violin Willow Window
    """.split()
)
HOTELS = tuple(
    """Alpine Astor Bella Bristol Carlton Central Dune Eden Elite Grand Hilltop Imperial Lagoon Lodge Marina Palm Plaza Regal
    Ritz Royal Savoy Vue
    """.split()
)
OFFICES = tuple(
    """East West North South Uptown Dock Bridge Canal Park Lake Hill Bay Cliff Court Field Gate Grove Mill Point Square
    """.split()
)
ANIMALS = tuple(
    """Babe Bella Biscuit Bruno Buddy Buster Candy Charm Chip Clover Cookie Daisy Dolly Duke Fern Ginger Hazel Holly Jewel Lady
    Lucky Luna Maggie Milo Misty Molly Nugget Patch Peanut Pippa Poppy Rex Rocky Rosie Ruby Rusty Scout Shadow Sunny Teddy
    """.split()
)
PLANES = tuple(
    """Albatross Condor Crane Dart Dove Falcon Finch Gull Heron Ibis Jay Kestrel Martin Merlin Osprey Pelican Robin Stork Swan
    Swift
    """.split()
)
PAINTINGS = tuple(
    """Angel Autumn Bather Bloom Boat Bride Bull Cherry Child Cliff Cottage Dance Duel Evening Fire Fruit Girl Harvest Hour
    Kiss Lake Lemon Lovers Market Moonrise Mother Oak Orange Oracle Peace Picnic Rain Reader Road Sailor Snow Spring Sunset
    Swing Wheat
    """.split()
)
CARS = tuple(
    """Ace Astra Beetle Bora Civic Clio Corsa Dart Fiesta Focus Fusion Galaxy Golf Ibiza Jazz Juke Kona Leaf Leon Logan Micra
    Mini Mondeo Niro Note Octavia Panda Passat Picanto Polo Prius Punto Qashqai Rapid Rio Soul Swift Tiguan Tucson Yaris
    """.split()
)
AGENCIES = tuple(
    """Aster Boreal Cosmo Deneb Ether Galax Hadar Kepler Lyra Mira Naos Orion Polar Quasar Rigel Sirius Spica Vega Zenit
    """.split()
)
MISSIONS = tuple(
    """Arrow Argus Beagle Calypso Ceres Clipper Dione Explorer Galileo Giotto Hermes Hope Icarus Juno Kite Lander Magellan
    Mariner Mercury Nomad Odyssey Pallas Pathway Phoenix Pioneer Planck Probe Pyxis Ranger Rosetta Saturn Seeker Spirit
    Stardust Trace Ulysses Venture Viking Voyager Zond
    """.split()
)
