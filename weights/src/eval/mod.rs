//! `weights eval`: what an adapter, and the correction by it, bring.

mod discriminate;
mod generate;

use clap::Subcommand;
use weights::Result;

use discriminate::Discriminate;
use generate::Generate;

/// What is measured.
#[derive(Subcommand)]
pub(crate) enum Eval {
    /// Matching against hard negatives, and boxes.
    Discriminate(Discriminate),
    /// How well generated pictures fit their captions, judged by the shapes world's oracle.
    Generate(Generate),
}

impl Eval {
    pub(crate) fn run(&self) -> Result<()> {
        match self {
            Self::Discriminate(discriminate) => discriminate.run(),
            Self::Generate(generate) => generate.run(),
        }
    }
}
