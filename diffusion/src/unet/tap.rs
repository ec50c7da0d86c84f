use std::fmt;

/// A U-Net block whose output can be read and differentiated: the output after the block's own down- or upsampler.
/// The order of the variants and their indices is the order of computation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Tap {
    /// Down block, finest level first: `down0`, `down1`, ...
    Down(usize),
    /// The block between: `mid`.
    Mid,
    /// Up block, coarsest level first: `up0`, `up1`, ...
    Up(usize),
}

impl fmt::Display for Tap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Tap::Down(i) => write!(f, "down{i}"),
            Tap::Mid => write!(f, "mid"),
            Tap::Up(i) => write!(f, "up{i}"),
        }
    }
}
