//! Where weights come from: training of the adapter and of LoRA (DPT's two stages), evaluation, and the shapes world in
//! which both can be measured. The program `weights` is its command line.

pub mod data;
mod discriminator;
mod error;
pub mod evaluate;
pub mod train;
pub mod world;

pub use discriminator::{Discriminator, Found, Rows};
pub use error::{Error, Result};
