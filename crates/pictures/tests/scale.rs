//! Scaling gives the same pixels as PIL.

use pictures::{Crop, Picture, Scaler};

#[test]
fn scaling_agrees_with_pil() {
    let source = Picture { width: 64, height: 48, pixels: include_bytes!("source.rgb").to_vec() };
    let text = include_str!("scaled.txt");
    let mut cases = 0;
    for line in text.lines() {
        let (numbers, hex) = line.rsplit_once(' ').unwrap();
        let numbers: Vec<usize> = numbers.split(' ').map(|number| number.parse().unwrap()).collect();
        let [left, top, width, height, w, h] = numbers[..] else { panic!("{numbers:?}") };
        let crop = Crop { top, left, height, width };
        let scaled = Scaler::default().scale(&source, crop, None, h, w).unwrap();
        let byte = |i: usize| u8::from_str_radix(&hex[2 * i..2 * i + 2], 16).unwrap();
        assert_eq!((scaled.len(), hex.len()), (w * h * 3, w * h * 6));
        // Both round to integers twice, after scaling the columns and after scaling the rows.
        let most = scaled.iter().enumerate().map(|(i, &found)| found.abs_diff(byte(i))).max().unwrap();
        assert!(most <= 1, "{most} for {numbers:?}");
        cases += 1;
    }
    assert_eq!(cases, 12);
}
