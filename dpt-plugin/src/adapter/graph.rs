//! Reverse-mode differentiation of the adapter: each operation leaves behind what pulls a cotangent back through it, and those whose
//! inputs ask for no gradient leave nothing.
//!
//! candle's own autograd adds every cotangent to zeros that it makes for it, two launches on a GPU where none is needed, and
//! has no place for sums that a product could form as it is written.

use std::collections::HashMap;

use candle_core::{Shape, Tensor, TensorId, Var};
use diffusion::Scope;

use crate::Result;

/// A tensor, and where its cotangent is summed if anything that it is made of asks for a gradient.
#[derive(Clone, Debug)]
pub struct Value {
    tensor: Tensor,
    slot: Option<usize>,
}

impl Value {
    /// Nothing asks for its gradient.
    pub fn constant(tensor: Tensor) -> Self {
        Self { tensor, slot: None }
    }

    /// What it is.
    pub fn tensor(&self) -> &Tensor {
        &self.tensor
    }

    /// Whether anything asks for its gradient.
    pub(super) fn is_followed(&self) -> bool {
        self.slot.is_some()
    }
}

/// A weight, which asks for a gradient where it is (a part of) a variable.
#[derive(Clone, Debug)]
pub(super) struct Parameter {
    tensor: Tensor,
    /// The variable, and the first of its rows that this is.
    variable: Option<(TensorId, usize)>,
}

impl Parameter {
    pub(super) fn load(scope: &Scope, name: &str, shape: &[usize]) -> Result<Self> {
        Ok(Self::new(&scope.tensor(name, shape)?))
    }

    pub(super) fn new(tensor: &Tensor) -> Self {
        Self { variable: tensor.is_variable().then(|| (tensor.id(), 0)), tensor: tensor.detach() }
    }

    pub(super) fn tensor(&self) -> &Tensor {
        &self.tensor
    }

    pub(super) fn is_trained(&self) -> bool {
        self.variable.is_some()
    }

    /// Some of the rows.
    pub(super) fn rows(&self, first: usize, count: usize) -> Result<Self> {
        let variable = self.variable.map(|(id, before)| (id, before + first));
        Ok(Self { tensor: self.tensor.narrow(0, first, count)?, variable })
    }

    /// The same values in another shape, with as many rows.
    pub(super) fn reshape(&self, shape: impl Into<Shape>) -> Result<Self> {
        Ok(Self { tensor: self.tensor.reshape(shape.into())?, variable: self.variable })
    }
}

type PullBack<'a> = Box<dyn FnOnce(Tensor, &mut Cotangents) -> Result<()> + 'a>;

/// What pulls cotangents back, in the order of computation. Inputs have nothing before them.
#[derive(Default)]
pub struct Graph<'a> {
    pull_backs: Vec<Option<PullBack<'a>>>,
}

impl<'a> Graph<'a> {
    /// An input whose gradient is asked for.
    pub fn input(&mut self, tensor: Tensor) -> Value {
        self.push(tensor, None)
    }

    /// The result of an operation. `pull_back` is given its cotangent, and adds to those of what it was computed from; it is dropped
    /// where none of them is `followed`.
    pub(super) fn record(
        &mut self,
        tensor: Tensor,
        followed: bool,
        pull_back: impl FnOnce(Tensor, &mut Cotangents) -> Result<()> + 'a,
    ) -> Value {
        if followed { self.push(tensor, Some(Box::new(pull_back))) } else { Value::constant(tensor) }
    }

    /// `count` of a value's rows along a dimension.
    pub fn narrow(&mut self, x: &Value, dim: usize, first: usize, count: usize) -> Result<Value> {
        let (y, x) = (x.tensor.narrow(dim, first, count)?.contiguous()?, x.clone());
        let rest = x.tensor.dim(dim)? - first - count;
        Ok(self.record(y, x.is_followed(), move |dy, found| found.add(&x, || Ok(dy.pad_with_zeros(dim, first, rest)?))))
    }

    /// Operations and inputs that are followed.
    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.pull_backs.len()
    }

    fn push(&mut self, tensor: Tensor, pull_back: Option<PullBack<'a>>) -> Value {
        self.pull_backs.push(pull_back);
        Value { tensor, slot: Some(self.pull_backs.len() - 1) }
    }

    /// The gradients of `sum(cotangent * output)` over the outputs. Panics where a cotangent has not its output's shape.
    pub fn backward(self, outputs: impl IntoIterator<Item = (Value, Tensor)>) -> Result<Cotangents> {
        let mut found = Cotangents { sums: vec![None; self.pull_backs.len()], parameters: HashMap::new() };
        for (output, cotangent) in outputs {
            assert_eq!(output.tensor.dims(), cotangent.dims(), "a cotangent's shape");
            found.add(&output, || Ok(cotangent))?;
        }
        for (slot, pull_back) in self.pull_backs.into_iter().enumerate().rev() {
            let Some(pull_back) = pull_back else { continue };
            // Where there is none, no output depends on it.
            if let Some(cotangent) = found.sums[slot].take() {
                pull_back(cotangent, &mut found)?;
            }
        }
        Ok(found)
    }
}

/// Cotangents as they are summed: in the end those of inputs and parameters.
pub struct Cotangents {
    sums: Vec<Option<Tensor>>,
    /// By the variable and the first of its rows.
    parameters: HashMap<TensorId, HashMap<usize, Tensor>>,
}

impl Cotangents {
    /// Adds to a value's cotangent, where its gradient is asked for.
    pub(super) fn add(&mut self, to: &Value, cotangent: impl FnOnce() -> Result<Tensor>) -> Result<()> {
        self.add_onto(to, |before| match before {
            None => cotangent(),
            Some(before) => Ok((before + cotangent()?)?),
        })
    }

    /// The same for an operation that adds to what is there on its own: `sum` is given what was summed before.
    pub(super) fn add_onto(&mut self, to: &Value, sum: impl FnOnce(Option<&Tensor>) -> Result<Tensor>) -> Result<()> {
        if let Some(slot) = to.slot {
            self.sums[slot] = Some(sum(self.sums[slot].as_ref())?);
        }
        Ok(())
    }

    /// Adds to a parameter's gradient, where it is trained.
    pub(super) fn add_parameter(&mut self, to: &Parameter, gradient: impl FnOnce() -> Result<Tensor>) -> Result<()> {
        if let Some((id, row)) = to.variable {
            let gradient = gradient()?;
            let parts = self.parameters.entry(id).or_default();
            let sum = match parts.get(&row) {
                None => gradient,
                Some(before) => (before + gradient)?,
            };
            parts.insert(row, sum);
        }
        Ok(())
    }

    /// The gradient for an input; `None` where no output depends on it.
    pub fn take(&mut self, input: &Value) -> Option<Tensor> {
        self.sums[input.slot?].take()
    }

    /// The gradient for a variable that the adapter was loaded from; `None` where no output depends on it.
    pub fn take_variable(&mut self, variable: &Var) -> Result<Option<Tensor>> {
        let Some(parts) = self.parameters.remove(&variable.id()) else { return Ok(None) };
        // An operation uses all rows of a variable, if by parts.
        let mut parts: Vec<(usize, Tensor)> = parts.into_iter().collect();
        parts.sort_by_key(|(row, _)| *row);
        let parts: Vec<Tensor> = parts.into_iter().map(|(_, part)| part).collect();
        let whole = if parts.len() == 1 { parts[0].clone() } else { Tensor::cat(&parts, 0)? };
        Ok(Some(whole.reshape(variable.shape())?))
    }
}
