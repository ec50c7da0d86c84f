//! A small adapter's gradients: in f64, which goes by tensor operations, against central differences; in f32, which goes by kernels,
//! against those of f64.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use candle_core::{DType, Device, Tensor, Var};
use diffusion::Checkpoint;

use super::*;

/// The first decoder layer begins with zeros, among which there is nothing to choose unless some are dropped.
const IDLE: &str = "transformer.decoder.layers.0.self_attn.in_proj_weight";

const TIMESTEPS: [f64; 2] = [3., 700.];

fn sizes() -> AdapterSizes {
    AdapterSizes {
        tap: "mid".into(),
        channels: 6,
        d_model: 8,
        heads: 2,
        feedforward: 10,
        encoder_layers: 1,
        decoder_layers: 2,
        matching_queries: 2,
        grounding_queries: 3,
        clip_dim: 5,
        classes: 3,
    }
}

/// Numbers of both signs and no pattern.
fn numbers(seed: usize, shape: &[usize]) -> Tensor {
    let value = |i: usize| (((i + 1) * (2 * seed + 3)) as f64 * 0.731).sin() * 0.7;
    Tensor::from_vec((0..shape.iter().product()).map(value).collect::<Vec<f64>>(), shape, &Device::Cpu).unwrap()
}

fn variables(dtype: DType) -> BTreeMap<String, Var> {
    let shapes = sizes().initial(&mut |_| 0., &Device::Cpu).unwrap().into_iter().collect::<BTreeMap<_, _>>();
    let variable = |(seed, (name, t)): (usize, (String, Tensor))| {
        (name, Var::from_tensor(&numbers(seed, t.dims()).to_dtype(dtype).unwrap()).unwrap())
    };
    shapes.into_iter().enumerate().map(variable).collect()
}

fn load(tensors: HashMap<String, Tensor>, dtype: DType) -> Adapter {
    Adapter::load(&Checkpoint::from_tensors(Path::new("a test"), tensors, dtype, &Device::Cpu).root(), sizes()).unwrap()
}

fn adapter(variables: &BTreeMap<String, Var>, dtype: DType) -> Adapter {
    load(variables.iter().map(|(name, v)| (name.clone(), v.as_tensor().clone())).collect(), dtype)
}

fn features() -> Tensor {
    numbers(100, &[2, 6, 3, 2])
}

/// Everything that the adapter answers, for items of which the second alone is asked for objects.
fn answers<'a>(adapter: &'a Adapter, graph: &mut Graph<'a>, features: &Value, dropped: f64) -> Vec<Value> {
    let mut state = 1u64;
    let mut bits = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        state ^ (state >> 29)
    };
    let queries = adapter
        .last_queries(graph, features, &adapter.sinusoids(&TIMESTEPS).unwrap(), &mut Dropout::new(dropped, &mut bits))
        .unwrap();
    let second = graph.narrow(&queries, 0, 1, 1).unwrap();
    let Grounding { class_logits, boxes, semantic } = adapter.grounding_of(graph, &second).unwrap();
    vec![adapter.matching_of(graph, &queries).unwrap(), class_logits, boxes, semantic.unwrap()]
}

fn cotangents(answers: &[Value]) -> Vec<Tensor> {
    let of = |(i, answer): (usize, &Value)| numbers(200 + i, answer.tensor().dims());
    answers.iter().enumerate().map(of).collect()
}

/// `sum(cotangent * answer)`.
fn total(variables: &BTreeMap<String, Var>, features: &Tensor, dropped: f64) -> f64 {
    let adapter = adapter(variables, DType::F64);
    let answers = answers(&adapter, &mut Graph::default(), &Value::constant(features.clone()), dropped);
    cotangents(&answers).iter().zip(&answers).map(|(c, answer)| dot(c, answer.tensor())).sum()
}

/// The total's gradients for the features, under no name, and every variable.
fn gradients(dtype: DType, dropped: f64) -> BTreeMap<String, Tensor> {
    let variables = variables(dtype);
    let adapter = adapter(&variables, dtype);
    let mut graph = Graph::default();
    let features = graph.input(features().to_dtype(dtype).unwrap());
    let answers = answers(&adapter, &mut graph, &features, dropped);
    let cotangents = cotangents(&answers).into_iter().map(|c| c.to_dtype(dtype).unwrap());
    let mut found = graph.backward(answers.iter().cloned().zip(cotangents)).unwrap();
    let mut all = BTreeMap::from([(String::new(), found.take(&features).unwrap())]);
    for (name, variable) in &variables {
        if let Some(gradient) = found.take_variable(variable).unwrap() {
            assert_eq!(gradient.dims(), variable.dims(), "{name}");
            all.insert(name.clone(), gradient);
        }
    }
    all.into_iter().map(|(name, t)| (name, t.to_dtype(DType::F64).unwrap())).collect()
}

fn dot(a: &Tensor, b: &Tensor) -> f64 {
    (a * b).unwrap().sum_all().unwrap().to_scalar().unwrap()
}

#[test]
fn gradients_are_those_of_central_differences() {
    const STEP: f64 = 1e-6;
    for dropped in [0., 0.3] {
        let (variables, gradients) = (variables(DType::F64), gradients(DType::F64, dropped));
        // Of the losses' temperature the answers know nothing.
        assert_eq!(gradients.len(), variables.len());
        let mut zeros = Vec::new();
        for (seed, (name, gradient)) in gradients.iter().enumerate() {
            let direction = numbers(300 + seed, gradient.dims());
            let at = |step: f64| {
                let moved = |t: &Tensor| (t + (&direction * step).unwrap()).unwrap();
                let Some(variable) = variables.get(name) else {
                    return total(&variables, &moved(&features()), dropped);
                };
                let before = variable.as_detached_tensor().copy().unwrap();
                variable.set(&moved(&before)).unwrap();
                let found = total(&variables, &features(), dropped);
                variable.set(&before).unwrap();
                found
            };
            let (slope, expected) = (dot(gradient, &direction), (at(STEP) - at(-STEP)) / (2. * STEP));
            assert!((slope - expected).abs() < 1e-7 * (1. + expected.abs()), "{name}: {slope}, expected {expected}");
            if slope.abs() < 1e-6 {
                zeros.push(name.as_str());
            }
        }
        assert_eq!(zeros, if dropped == 0. { &[IDLE][..] } else { &[] }, "nothing to compare");
    }
}

#[test]
fn gradients_by_kernels_are_those_by_tensor_operations() {
    for dropped in [0., 0.3] {
        let exact = gradients(DType::F64, dropped);
        for (name, found) in gradients(DType::F32, dropped).into_iter().filter(|(name, _)| dropped > 0. || name != IDLE)
        {
            let off = (&found - &exact[&name]).unwrap();
            let (off, size) = (dot(&off, &off).sqrt(), dot(&exact[&name], &exact[&name]).sqrt());
            assert!(off < 1e-4 * size, "{name}: off by {off} of {size}");
        }
    }
}

/// At inference nothing is spent on the weights' gradients, nor on those of queries that know nothing of the features yet.
#[test]
fn weights_that_are_not_variables_have_no_gradient() {
    let (all, dtype) = (variables(DType::F64), DType::F64);
    let fixed = load(all.iter().map(|(name, v)| (name.clone(), v.as_detached_tensor())).collect(), dtype);
    let mut graph = Graph::default();
    answers(&fixed, &mut graph, &Value::constant(features()), 0.);
    assert_eq!(graph.len(), 0);

    let features = graph.input(features());
    let answers = answers(&fixed, &mut graph, &features, 0.);
    let cotangents = cotangents(&answers);
    let mut found = graph.backward(answers.into_iter().zip(cotangents)).unwrap();
    for variable in all.values() {
        assert!(found.take_variable(variable).unwrap().is_none());
    }
    let gradient = found.take(&features).unwrap();
    let off = (&gradient - &gradients(dtype, 0.)[""]).unwrap();
    assert!(dot(&off, &off).sqrt() < 1e-12 * dot(&gradient, &gradient).sqrt());
}

#[test]
fn an_answer_that_is_not_asked_about_has_no_part_in_the_gradients() {
    let variables = variables(DType::F64);
    let adapter = adapter(&variables, DType::F64);
    let mut graph = Graph::default();
    let features = graph.input(features());
    let answers = answers(&adapter, &mut graph, &features, 0.);
    let cotangent = cotangents(&answers).swap_remove(0);
    let mut found = graph.backward([(answers[0].clone(), cotangent)]).unwrap();
    let mut gradient = |name: &str| found.take_variable(&variables[name]).unwrap();
    assert!(gradient("map_to_clip.2.weight").is_some() && gradient("class_embed.weight").is_none());
}
