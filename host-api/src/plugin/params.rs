//! Parameters that a user may turn.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::error::{Error, Result, Status};

/// What values a parameter takes. Every value is a number on the wire.
#[derive(Clone, Debug, PartialEq)]
pub enum ParamKind {
    /// A number from `minimum` to `maximum`.
    Float {
        /// Smallest value.
        minimum: f64,
        /// Largest value.
        maximum: f64,
    },
    /// A whole number from `minimum` to `maximum`.
    Integer {
        /// Smallest value.
        minimum: i64,
        /// Largest value.
        maximum: i64,
    },
    /// 0 or 1.
    Boolean,
    /// An index into these names.
    Choice(Vec<String>),
}

impl ParamKind {
    /// Smallest and largest value.
    pub fn range(&self) -> (f64, f64) {
        match self {
            Self::Float { minimum, maximum } => (*minimum, *maximum),
            Self::Integer { minimum, maximum } => (*minimum as f64, *maximum as f64),
            Self::Boolean => (0.0, 1.0),
            Self::Choice(names) => (0.0, names.len().saturating_sub(1) as f64),
        }
    }

    /// Whether only whole numbers are values.
    pub fn is_whole(&self) -> bool {
        !matches!(self, Self::Float { .. })
    }
}

/// One parameter.
#[derive(Clone, Debug, PartialEq)]
pub struct ParamSpec {
    /// The key in the configuration.
    pub name: String,
    /// For people.
    pub description: String,
    /// Empty when it has none.
    pub unit: String,
    /// What values it takes.
    pub kind: ParamKind,
    /// Value without configuration.
    pub default: f64,
    /// Whether it may change during a run; otherwise only before `prepare`.
    pub live: bool,
}

impl ParamSpec {
    /// Whether `value` is one of the parameter's.
    pub fn check(&self, value: f64) -> Result<()> {
        let (minimum, maximum) = self.kind.range();
        let name = &self.name;
        if !(minimum..=maximum).contains(&value) {
            return Err(Error::invalid_argument(format!("{name} = {value} is not between {minimum} and {maximum}")));
        }
        if self.kind.is_whole() && value.fract() != 0.0 {
            return Err(Error::invalid_argument(format!("{name} = {value} is not a whole number")));
        }
        Ok(())
    }
}

/// The parameters of one instance and their values, which any thread may read and set at any time.
#[derive(Debug)]
pub struct Params {
    specs: Vec<ParamSpec>,
    values: Vec<AtomicU64>,
    schema: String,
}

impl Params {
    /// Parameters at their defaults. `schema` is the JSON schema of the plugin's configuration.
    pub fn new(specs: Vec<ParamSpec>, schema: impl Into<String>) -> Result<Self> {
        for (index, spec) in specs.iter().enumerate() {
            spec.check(spec.default).map_err(|error| error.context("default"))?;
            if specs[..index].iter().any(|other| other.name == spec.name) {
                return Err(Error::invalid_argument(format!("two parameters are named {}", spec.name)));
            }
        }
        let values = specs.iter().map(|spec| AtomicU64::new(spec.default.to_bits())).collect();
        Ok(Self { specs, values, schema: schema.into() })
    }

    /// All parameters.
    pub fn specs(&self) -> &[ParamSpec] {
        &self.specs
    }

    /// JSON schema of the configuration.
    pub fn schema(&self) -> &str {
        &self.schema
    }

    /// Position of the parameter of that name.
    pub fn index(&self, name: &str) -> Result<usize> {
        self.specs
            .iter()
            .position(|spec| spec.name == name)
            .ok_or_else(|| Error::new(Status::NotFound, format!("no parameter {name}")))
    }

    /// The parameter at `index`.
    pub fn spec(&self, index: usize) -> Result<&ParamSpec> {
        let count = self.specs.len();
        self.specs.get(index).ok_or_else(|| Error::invalid_argument(format!("parameter {index} of {count}")))
    }

    /// The value at `index`.
    pub fn get(&self, index: usize) -> Result<f64> {
        self.spec(index)?;
        Ok(f64::from_bits(self.values[index].load(Ordering::Acquire)))
    }

    /// Sets the value at `index` after checking it. Whether it is `live` is for the caller to mind.
    pub fn set(&self, index: usize, value: f64) -> Result<()> {
        self.spec(index)?.check(value)?;
        self.values[index].store(value.to_bits(), Ordering::Release);
        Ok(())
    }

    /// The value of that name.
    pub fn get_by_name(&self, name: &str) -> Result<f64> {
        self.get(self.index(name)?)
    }

    /// Sets the value of that name after checking it.
    pub fn set_by_name(&self, name: &str, value: f64) -> Result<()> {
        self.set(self.index(name)?, value)
    }
}
