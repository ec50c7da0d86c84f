//! Views as a host builds them.

use half::{bf16, f16};
use host_api::{Dtype, Status, View, ViewMut};

#[test]
fn views_reach_no_further_than_their_slice() {
    let numbers: Vec<f32> = (0..12).map(|i| i as f32).collect();
    let view = View::new(&numbers, &[3, 4]).unwrap();
    assert_eq!(
        (view.shape(), view.len(), view.dtype(), view.is_contiguous()),
        ([3, 4].as_slice(), 12, Dtype::F32, true)
    );
    assert_eq!(view.item(2).to_vec(), [8.0, 9.0, 10.0, 11.0]);
    assert_eq!(View::new(&numbers, &[3, 3]).unwrap_err().status, Status::ShapeMismatch);
    assert_eq!(View::new(&numbers, &[13]).unwrap_err().status, Status::ShapeMismatch);
    let transposed = View::strided(&numbers, &[2, 3], &[1, 4], 2).unwrap();
    assert_eq!(transposed.to_vec(), [2.0, 6.0, 10.0, 3.0, 7.0, 11.0]);
    assert!(!transposed.is_contiguous());
    assert_eq!(View::strided(&numbers, &[12], &[-1], 11).unwrap().to_vec()[..2], [11.0, 10.0]);
    assert_eq!(View::strided(&numbers, &[5], &[0], 3).unwrap().to_vec(), [3.0; 5]);
    for (shape, strides, offset) in [
        (&[2, 3][..], &[1, 4][..], 3),
        (&[12], &[-1], 10),
        (&[1], &[1], 12),
        (&[2], &[isize::MAX], 0),
        (&[usize::MAX], &[0], 0),
        (&[2, 2], &[1], 0),
        (&[1; 9], &[1; 9], 0),
    ] {
        View::strided(&numbers, shape, strides, offset).unwrap_err();
    }
    assert!(View::strided(&numbers, &[0, 4], &[99, 1], 99).unwrap().to_vec().is_empty());
    assert_eq!(View::strided(&numbers, &[], &[], 7).unwrap().to_vec(), [7.0], "a scalar");
    assert_eq!(View::strided(&numbers, &[1, 2], &[isize::MAX, 1], 0).unwrap().to_vec(), [0.0, 1.0]);
}

#[test]
fn writes_are_rounded_to_the_nearest() {
    let value = 1.000_976_6; // above the middle between two neighbours in both types or just one of them
    let (mut halves, mut brains) = ([f16::ZERO; 2], [bf16::ZERO; 2]);
    ViewMut::new(&mut halves, &[2]).unwrap().write(&[value, 70000.0]).unwrap();
    ViewMut::new(&mut brains, &[2]).unwrap().write(&[value, 70000.0]).unwrap();
    assert_eq!(halves, [f16::from_f32(value), f16::INFINITY]);
    assert_eq!(brains, [bf16::ONE, bf16::from_f32(70000.0)]);
    assert_eq!(View::new(&halves[..1], &[1]).unwrap().to_vec(), [1.000_976_6]);
}

#[test]
fn writable_elements_have_a_place_each() {
    let mut numbers = [0.0f32; 12];
    for (shape, strides) in [(&[2, 2][..], &[0, 1][..]), (&[2, 3], &[1, 1]), (&[3, 2], &[2, 4]), (&[12, 12], &[0, 1])] {
        let error = ViewMut::strided(&mut numbers, shape, strides, 0).unwrap_err();
        assert_eq!(error.status, Status::InvalidArgument, "{shape:?} {strides:?}");
    }
    // Strides that cross without meeting: 0, 3, 6 and 2, 5, 8.
    let mut crossing = ViewMut::strided(&mut numbers, &[2, 3], &[2, 3], 0).unwrap();
    crossing.write(&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]).unwrap();
    assert_eq!(crossing.write(&[1.0]).unwrap_err().status, Status::ShapeMismatch);
    crossing.item_mut(1).write(&[7.0, 8.0, 9.0]).unwrap();
    assert_eq!(numbers, [1.0, 0.0, 7.0, 2.0, 0.0, 8.0, 3.0, 0.0, 9.0, 0.0, 0.0, 0.0]);
}
