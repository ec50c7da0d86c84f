use std::fmt;

use super::{Caption, Colour, Shape};

/// Prompts that are trained on, and those that are kept to see whether what was learnt carries over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, clap::ValueEnum)]
pub enum Split {
    /// Trained on.
    Train,
    /// Kept.
    HeldOut,
}

impl fmt::Display for Split {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Train => "train",
            Self::HeldOut => "held-out",
        })
    }
}

impl Split {
    /// The split of a caption, by what it names and not by how: which colours, which shapes. So "a red circle and a blue
    /// square", "a blue circle and a red square" and every relation of the two are in one split, as are all numbers of the
    /// same object. A fifth to a quarter of each category is held out.
    pub fn of(caption: &Caption) -> Self {
        let kinds = caption.kinds();
        let (a, b) = (kinds[0], kinds[kinds.len() - 1]);
        let held_out = match caption {
            // What is held out is a combination: its colours are trained on with other shapes, and its shapes with others.
            Caption::Pair(..) | Caption::Related(..) => {
                let colours = pair(a.colour as usize, b.colour as usize, Colour::ALL.len());
                let shapes = pair(a.shape as usize, b.shape as usize, Shape::ALL.len());
                (colours + 2 * shapes).is_multiple_of(5)
            }
            Caption::Count(..) => (a.colour as usize + a.shape as usize) % 5 == 1,
            Caption::One(_) => (a.colour as usize + 2 * a.shape as usize) % 5 == 2,
        };
        if held_out { Self::HeldOut } else { Self::Train }
    }
}

/// The number of an unordered pair among those of `n` things.
fn pair(a: usize, b: usize, n: usize) -> usize {
    let (low, high) = (a.min(b), a.max(b));
    low * n + high
}
