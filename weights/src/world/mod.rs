//! The shapes world: drawn scenes in which everything that is claimed of the method can be measured.
//!
//! A [`Scene`] holds one to three objects of six colours and four shapes; a [`Caption`] says what it shows, and a hard
//! negative of both says nearly the same. [`see`] finds the objects in a picture, so that whether a generated picture fits
//! its caption is decided without a model, by [`Caption::fits`].

mod caption;
mod example;
mod expression;
mod oracle;
mod random;
mod scene;
mod split;

pub use caption::{Caption, Category, Relation};
pub use example::{WorldExample, example, hard_negative, sample_caption};
pub use expression::{Expression, expressions};
pub use oracle::{Seen, see};
pub use random::Random;
pub use scene::{Colour, Kind, Object, SIDE, Scene, Shape};
pub use split::Split;
