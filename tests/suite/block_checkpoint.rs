//! The block of a released checkpoint is the block of its weights, in every type of numbers; what
//! does not fit is named.
use crate::common::normal;
use dijiang::{DijiangBlock, DijiangWeights, Error, OfficialDijiang, Rotary, decay};
use half::{bf16, f16};
use ndarray::{Array1, Array2};
use safetensors::tensor::{Dtype, SafeTensors, TensorView, serialize};
use std::collections::BTreeMap;

const PREFIX: &str = "gpt_neox.layers.7.attention";
const HIDDEN: usize = 24;
const HEADS: usize = 3;
const DIM: usize = HIDDEN / HEADS;

/// Name, shape, numbers.
type Tensors = BTreeMap<&'static str, (Vec<usize>, Vec<f64>)>;

/// The tensors of a layer, those that nobody needs among them.
fn tensors() -> Tensors {
    let matrix = |rows, columns, seed| {
        (vec![rows, columns], normal::<f64>(rows, columns, 0.3, seed).into_iter().collect())
    };
    let vector = |len, seed| (vec![len], normal::<f64>(1, len, 0.3, seed).into_iter().collect());
    let radii = normal::<f64>(1, DIM, 1.0, 8).row(0).to_owned();
    let projection = OfficialDijiang::new(radii).unwrap().projection();
    let positions = 16;
    let powers = |sign: i32| {
        let decays = decay::dijiang(HEADS);
        let numbers = (0..HEADS * positions)
            .map(|i| decays[i / positions].powi(sign * (i % positions) as i32));
        (vec![1, HEADS, positions, 1], numbers.collect())
    };
    BTreeMap::from([
        ("query_key_value.weight", matrix(3 * HIDDEN, HIDDEN, 1)),
        ("query_key_value.bias", vector(3 * HIDDEN, 2)),
        ("dense.weight", matrix(HIDDEN, HIDDEN, 3)),
        ("dense.bias", vector(HIDDEN, 4)),
        ("W_G", matrix(HIDDEN, HIDDEN, 5)),
        ("group_norm.weight", vector(HIDDEN, 6)),
        ("group_norm.bias", vector(HIDDEN, 7)),
        ("proj_matrix", (vec![DIM, DIM], projection.t().iter().copied().collect())),
        ("D1", powers(1)),
        ("D2", powers(-1)),
        ("mask", (vec![1, HEADS, 1, 1], vec![1.0; HEADS])),
        ("masked_bias", (vec![], vec![-1e9])),
        ("rotary_emb.inv_freq", (vec![1], vec![1.0])),
    ])
}

/// A number as it is stored, and what is then read.
fn stored(dtype: Dtype, x: f64) -> (Vec<u8>, f64) {
    match dtype {
        Dtype::F64 => (x.to_le_bytes().to_vec(), x),
        Dtype::F32 => ((x as f32).to_le_bytes().to_vec(), f64::from(x as f32)),
        Dtype::F16 => (f16::from_f64(x).to_le_bytes().to_vec(), f16::from_f64(x).to_f64()),
        Dtype::BF16 => (bf16::from_f64(x).to_le_bytes().to_vec(), bf16::from_f64(x).to_f64()),
        _ => ((x as i64).to_le_bytes().to_vec(), x.trunc()),
    }
}

/// The bytes of a file, types by name.
fn file(tensors: &Tensors, dtype: impl Fn(&str) -> Dtype) -> Vec<u8> {
    let bytes: Vec<_> = tensors
        .iter()
        .map(|(name, (shape, numbers))| {
            (
                *name,
                shape,
                numbers.iter().flat_map(|&x| stored(dtype(name), x).0).collect::<Vec<u8>>(),
            )
        })
        .collect();
    let views = bytes.iter().map(|(name, shape, bytes)| {
        (format!("{PREFIX}.{name}"), TensorView::new(dtype(name), shape.to_vec(), bytes).unwrap())
    });
    serialize(views, None).unwrap()
}

fn rotary() -> Rotary {
    Rotary::gpt_neox(DIM, 0.25).unwrap()
}

fn load(bytes: &[u8]) -> Result<DijiangBlock<f64>, Error> {
    DijiangBlock::from_safetensors(
        &SafeTensors::deserialize(bytes).unwrap(),
        PREFIX,
        HEADS,
        rotary(),
    )
}

#[test]
fn every_type_of_numbers_gives_the_block_of_its_weights() {
    for dtype in [Dtype::F64, Dtype::F32, Dtype::F16, Dtype::BF16] {
        let tensors = tensors();
        let bytes = file(&tensors, |_| dtype);
        let read = |name: &str| tensors[name].1.iter().map(|&x| stored(dtype, x).1);
        let vector = |name: &str| read(name).collect::<Array1<f64>>();
        let matrix = |name: &str| {
            let shape = &tensors[name].0;
            Array2::from_shape_vec((shape[0], shape[1]), read(name).collect()).unwrap()
        };
        let projection = matrix("proj_matrix");
        let block = DijiangBlock::new(
            DijiangWeights {
                query_key_value: matrix("query_key_value.weight"),
                query_key_value_bias: vector("query_key_value.bias"),
                dense: matrix("dense.weight"),
                dense_bias: vector("dense.bias"),
                gate: matrix("W_G"),
                group_norm_weight: vector("group_norm.weight"),
                group_norm_bias: vector("group_norm.bias"),
                radii: OfficialDijiang::from_projection(projection.view()).unwrap().radii().clone(),
            },
            HEADS,
            rotary(),
        )
        .unwrap();
        let x = normal::<f64>(20, HIDDEN, 1.0, 9);
        let out = block.forward(x.view()).unwrap();
        assert_eq!(load(&bytes).unwrap().forward(x.view()).unwrap(), out, "{dtype:?}");
        let single = DijiangBlock::<f32>::from_safetensors(
            &SafeTensors::deserialize(&bytes).unwrap(),
            PREFIX,
            HEADS,
            rotary(),
        );
        let single = single.unwrap().forward(x.mapv(|x| x as f32).view()).unwrap();
        assert!(
            single.iter().zip(&out).all(|(a, b)| (f64::from(*a) - b).abs() < 1e-4),
            "{dtype:?}"
        );
    }
}

#[test]
fn tables_of_decays_are_optional() {
    let mut tensors = tensors();
    for name in ["D1", "D2", "mask", "masked_bias", "rotary_emb.inv_freq"] {
        tensors.remove(name);
    }
    load(&file(&tensors, |_| Dtype::F32)).unwrap();
    tensors.insert("D1", (vec![1, HEADS, 1, 1], vec![1.0; HEADS])); // of one position: says nothing
    load(&file(&tensors, |_| Dtype::F32)).unwrap();
}

/// The name and what is found.
fn problem(bytes: &[u8]) -> (String, String) {
    match load(bytes).unwrap_err() {
        Error::Tensor { name, found, needed } => {
            let text =
                Error::Tensor { name: name.clone(), found: found.clone(), needed }.to_string();
            assert!(text.contains(&name) && text.contains(&found));
            (name.strip_prefix(PREFIX).unwrap().trim_start_matches('.').to_owned(), found)
        }
        other => panic!("{other}"),
    }
}

#[test]
fn tensors_that_do_not_fit_are_named() {
    const NEEDED: [&str; 8] = [
        "query_key_value.weight",
        "query_key_value.bias",
        "dense.weight",
        "dense.bias",
        "W_G",
        "group_norm.weight",
        "group_norm.bias",
        "proj_matrix",
    ];
    let float = |_: &str| Dtype::F32;
    for name in NEEDED {
        let mut missing = tensors();
        missing.remove(name);
        assert_eq!(problem(&file(&missing, float)), (name.to_owned(), "missing".to_owned()));
        let integers =
            file(&tensors(), |other| if other == name { Dtype::I64 } else { Dtype::F32 });
        assert_eq!(problem(&integers), (name.to_owned(), "of type I64".to_owned()));
        if name != "query_key_value.weight" {
            let mut small = tensors();
            small.insert(name, (vec![2, 3], vec![0.0; 6]));
            assert_eq!(
                problem(&file(&small, float)),
                (name.to_owned(), "of shape [2, 3]".to_owned())
            );
        }
    }
    for shape in [vec![6], vec![2, 3], vec![1, 6, 1], vec![6, 0]] {
        let mut other = tensors();
        let count = shape.iter().product();
        other.insert("query_key_value.weight", (shape, vec![0.0; count]));
        assert!(load(&file(&other, float)).is_err());
    }
}

#[test]
fn another_map_and_other_decays_are_refused() {
    let mut trained = tensors();
    trained.get_mut("proj_matrix").unwrap().1[5] += 0.2;
    let (name, found) = problem(&file(&trained, |_| Dtype::F32));
    assert!(name == "proj_matrix" && found.contains("difference"), "{found}");

    for dtype in [Dtype::F64, Dtype::F32, Dtype::F16, Dtype::BF16] {
        let mut slower = tensors();
        slower.get_mut("D1").unwrap().1[1] -= 0.01;
        let (name, found) = problem(&file(&slower, |_| dtype));
        assert!(name == "D1" && found.contains("head 0"), "{found}");
    }
    let mut of_other_heads = tensors();
    of_other_heads.insert("D1", (vec![1, 2, 2, 1], vec![1.0; 4]));
    assert_eq!(problem(&file(&of_other_heads, |_| Dtype::F32)).1, "of shape [1, 2, 2, 1]");
    let mut flat = tensors();
    flat.insert("D1", (vec![4], vec![1.0; 4]));
    assert_eq!(problem(&file(&flat, |_| Dtype::F32)).1, "of shape [4]");
}

#[test]
fn wrong_heads_and_numbers_that_are_not_finite() {
    let bytes = file(&tensors(), |_| Dtype::F32);
    let file_of = SafeTensors::deserialize(&bytes).unwrap();
    let with = |heads, d| {
        DijiangBlock::<f32>::from_safetensors(
            &file_of,
            PREFIX,
            heads,
            Rotary::partial(d, 2).unwrap(),
        )
        .unwrap_err()
    };
    assert_eq!(with(0, 8), Error::ZeroSize { which: "heads" });
    assert!(matches!(with(2, 12), Error::Tensor { .. }));
    assert!(matches!(with(7, 3), Error::Tensor { .. }));
    assert!(matches!(with(100, 3), Error::Tensor { .. }));
    assert!(matches!(with(3, 6), Error::Shape { which: "rotary", .. }));
    let mut bad = tensors();
    bad.get_mut("W_G").unwrap().1[HIDDEN + 2] = f64::NAN;
    let error = load(&file(&bad, |_| Dtype::F16)).unwrap_err();
    assert_eq!(error, Error::NotFinite { which: "gate", row: 1, column: 2 });
    let error =
        DijiangBlock::<f32>::from_safetensors(&file_of, "gpt_neox.layers.8", HEADS, rotary())
            .unwrap_err();
    let text = "tensor `gpt_neox.layers.8.query_key_value.weight` is missing where one of shape \
                [3·hidden, hidden] is needed";
    assert!(error.to_string().starts_with(text), "{error}");
}

/// A state goes from one load of a layer to another, and not into another layer.
#[test]
fn states_belong_to_the_layer_that_was_loaded() {
    for dtype in [Dtype::F64, Dtype::F32, Dtype::F16, Dtype::BF16] {
        let bytes = file(&tensors(), |_| dtype);
        let x = normal::<f64>(9, HIDDEN, 1.0, 21);
        let mut out = Array2::zeros((9, HIDDEN));
        let mut stream = load(&bytes).unwrap().stream().unwrap();
        stream.extend(x.view(), out.view_mut()).unwrap();
        let mut again = load(&bytes).unwrap().stream().unwrap();
        again.restore(&stream.save().unwrap()).unwrap();
        let mut expected = Array2::zeros((9, HIDDEN));
        stream.extend(x.view(), expected.view_mut()).unwrap();
        again.extend(x.view(), out.view_mut()).unwrap();
        assert_eq!(out, expected);

        let mut other = tensors();
        other.get_mut("query_key_value.weight").unwrap().1[5] += 1.0;
        let mut other = load(&file(&other, |_| dtype)).unwrap().stream().unwrap();
        assert!(matches!(other.restore(&stream.save().unwrap()), Err(Error::State { .. })));
        assert!(other.is_empty());
    }
}
