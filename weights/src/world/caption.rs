use std::fmt;

use super::{Colour, Kind, Seen};
/// Where one object is, seen from another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs, reason = "the names say it")]
pub enum Relation {
    Left,
    Right,
    Above,
    Below,
}

impl Relation {
    /// Every relation.
    pub const ALL: [Self; 4] = [Self::Left, Self::Right, Self::Above, Self::Below];
    /// Pixels by which centres must differ for the relation to hold.
    pub(super) const CLEAR: f64 = 6.;

    /// Its words.
    pub fn words(self) -> &'static str {
        match self {
            Self::Left => "to the left of",
            Self::Right => "to the right of",
            Self::Above => "above",
            Self::Below => "below",
        }
    }

    /// The other direction.
    pub fn reversed(self) -> Self {
        match self {
            Self::Left => Self::Right,
            Self::Right => Self::Left,
            Self::Above => Self::Below,
            Self::Below => Self::Above,
        }
    }

    /// Whether an object at `a` has this relation to one at `b`: the offset is clear, and larger than across.
    pub fn holds(self, a: (f64, f64), b: (f64, f64)) -> bool {
        let (dx, dy) = (a.0 - b.0, a.1 - b.1);
        let (along, across) = match self {
            Self::Left => (-dx, dy),
            Self::Right => (dx, dy),
            Self::Above => (-dy, dx),
            Self::Below => (dy, dx),
        };
        along > Self::CLEAR && along > across.abs()
    }
}

/// What is asked of a picture.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Caption {
    /// "a red circle".
    One(Kind),
    /// "a red circle and a blue square".
    Pair(Kind, Kind),
    /// "a red circle above a blue square".
    Related(Kind, Relation, Kind),
    /// "two red circles"; 2 or 3.
    Count(usize, Kind),
}

/// What a caption tests.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Category {
    /// One object.
    One,
    /// Attributes of two objects.
    Binding,
    /// Where they are.
    Spatial,
    /// How many.
    Count,
}

impl Category {
    /// Every category.
    pub const ALL: [Self; 4] = [Self::One, Self::Binding, Self::Spatial, Self::Count];

    /// Its word.
    pub fn name(self) -> &'static str {
        match self {
            Self::One => "one",
            Self::Binding => "binding",
            Self::Spatial => "spatial",
            Self::Count => "count",
        }
    }
}

impl Caption {
    /// What it tests.
    pub fn category(&self) -> Category {
        match self {
            Self::One(_) => Category::One,
            Self::Pair(..) => Category::Binding,
            Self::Related(..) => Category::Spatial,
            Self::Count(..) => Category::Count,
        }
    }

    /// The objects that it names.
    pub fn kinds(&self) -> Vec<Kind> {
        match *self {
            Self::One(kind) => vec![kind],
            Self::Pair(a, b) | Self::Related(a, _, b) => vec![a, b],
            Self::Count(n, kind) => vec![kind; n],
        }
    }

    /// Whether a picture shows these objects, no others, and in this relation.
    pub fn fits(&self, seen: &[Seen]) -> bool {
        let kinds = seen.iter().map(|object| object.kind).collect::<Option<Vec<_>>>();
        let Some(mut found) = kinds else { return false };
        let mut expected = self.kinds();
        found.sort();
        expected.sort();
        if found != expected {
            return false;
        }
        match *self {
            Self::Related(a, relation, b) => {
                let at =
                    |kind: Kind| seen.iter().find(|o| o.kind == Some(kind)).map(|o| o.centre).expect("found above");
                relation.holds(at(a), at(b))
            }
            _ => true,
        }
    }
}

/// "an orange circle".
fn one(kind: Kind) -> String {
    let article = if kind.colour == Colour::Orange { "an" } else { "a" };
    format!("{article} {} {}", kind.colour.name(), kind.shape.name())
}

impl fmt::Display for Caption {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::One(kind) => write!(f, "{}", one(kind)),
            Self::Pair(a, b) => write!(f, "{} and {}", one(a), one(b)),
            Self::Related(a, relation, b) => write!(f, "{} {} {}", one(a), relation.words(), one(b)),
            Self::Count(n, kind) => {
                let number = if n == 2 { "two" } else { "three" };
                write!(f, "{number} {} {}", kind.colour.name(), kind.shape.plural())
            }
        }
    }
}
