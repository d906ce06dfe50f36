// The safetensors format: eight bytes with the length of a JSON header, the header, and the tensors' bytes.

const TYPES = {
  F32: { type: "float32", from: Float32Array },
  I64: { type: "int64", from: BigInt64Array },
};

/**
 * The tensors in a file, by name; of those types that the networks of the page have.
 * @param {ArrayBuffer} file
 * @returns {Map<string, {type: string, data: Float32Array | BigInt64Array, dims: number[]}>}
 */
export function readSafetensors(file) {
  const start = 8 + Number(new DataView(file).getBigUint64(0, true));
  const header = JSON.parse(new TextDecoder().decode(new Uint8Array(file, 8, start - 8)));
  delete header.__metadata__;
  return new Map(
    Object.entries(header).map(
      ([
        name,
        {
          dtype,
          shape,
          data_offsets: [begin, end],
        },
      ]) => {
        const { type, from } = TYPES[dtype];
        return [name, { type, data: new from(file.slice(start + begin, start + end)), dims: shape }];
      },
    ),
  );
}
