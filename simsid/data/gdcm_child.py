"""Decodes JPEG data with GDCM in a process of its own: damaged data can make GDCM abort the process.

Run as a script by `decode_in_child`. Standard input has the numbers of `_HEADER` and the JPEG data, standard output
gets the samples in native byte order.
"""

import struct
import subprocess
import sys

_HEADER = struct.Struct("<IIII")  # rows, columns, bits allocated, transfer syntax as below
_SYNTAXES = ("JPEGLosslessProcess14", "JPEGLosslessProcess14_1", "JPEGExtendedProcess2_4")
LOSSLESS, LOSSLESS_FIRST_ORDER, EXTENDED = range(3)


def decode_in_child(data: bytes, rows: int, columns: int, allocated: int, syntax: int, seconds: float) -> bytes:
    """Return the samples of one gray JPEG image, `rows * columns * allocated / 8` bytes.

    Raises:
        RuntimeError: the process died, reported damage or took longer than `seconds`; the message says which.
    """
    try:
        child = subprocess.run(
            [sys.executable, __file__],
            input=_HEADER.pack(rows, columns, allocated, syntax) + data,
            capture_output=True,
            timeout=seconds,
        )
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"GDCM took longer than {seconds:g} s") from None
    if child.returncode < 0:
        raise RuntimeError(f"GDCM died of signal {-child.returncode}")
    # libjpeg fills what is missing with gray and only warns.
    if child.returncode or any(warning in child.stderr.lower() for warning in (b"premature end", b"bad huffman")):
        raise RuntimeError("the JPEG data is damaged or cut off")
    if len(child.stdout) != rows * columns * allocated // 8:
        raise RuntimeError("GDCM returned an image of another size")
    return child.stdout


def _decode(request: bytes) -> str:
    """Return the samples as GDCM does: as text, whose surrogates stand for bytes that are not UTF-8."""
    import gdcm

    rows, columns, allocated, syntax = _HEADER.unpack_from(request)
    fragment = gdcm.Fragment()
    fragment.SetByteStringValue(request[_HEADER.size :])
    fragments = gdcm.SequenceOfFragments.New()
    fragments.AddFragment(fragment)
    element = gdcm.DataElement(gdcm.Tag(0x7FE0, 0x0010))
    element.SetValue(fragments.__ref__())
    image = gdcm.Image()
    image.SetNumberOfDimensions(2)
    image.SetDimensions((columns, rows, 1))
    image.SetDataElement(element)
    image.SetPhotometricInterpretation(gdcm.PhotometricInterpretation(gdcm.PhotometricInterpretation.MONOCHROME2))
    image.SetTransferSyntax(gdcm.TransferSyntax(getattr(gdcm.TransferSyntax, _SYNTAXES[syntax])))
    image.SetPixelFormat(gdcm.PixelFormat(1, allocated, allocated, allocated - 1, 0))
    return image.GetBuffer()


if __name__ == "__main__":
    # The folder of this script holds modules of simsid, which would hide others of the same name.
    del sys.path[0]
    samples = _decode(sys.stdin.buffer.read())
    # In pieces: the text takes twice the memory of its bytes.
    for start in range(0, len(samples), 2**20):
        sys.stdout.buffer.write(samples[start : start + 2**20].encode("utf-8", "surrogateescape"))
